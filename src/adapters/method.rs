//! The registry: every method by name. Flags, tables and the error for an unknown name come from here.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A training method.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "the table below says what they are")]
pub enum Method {
    #[default]
    Lora,
    Dora,
    Pissa,
}

/// One row of the registry.
#[derive(Debug)]
pub struct MethodInfo {
    /// The method.
    pub method: Method,
    /// What is typed after `--method`.
    pub name: &'static str,
    /// PEFT's `peft_type`.
    pub peft_type: &'static str,
    /// One line for people.
    pub about: &'static str,
    /// Whether a magnitude per row is trained.
    pub magnitude: bool,
    /// Whether the base is split before training.
    pub staged: bool,
}

/// All methods.
pub const METHODS: [MethodInfo; 3] = [
    MethodInfo {
        method: Method::Lora,
        name: "lora",
        peft_type: "LORA",
        about: "a low-rank pair beside every target",
        magnitude: false,
        staged: false,
    },
    MethodInfo {
        method: Method::Dora,
        name: "dora",
        peft_type: "LORA",
        about: "a low-rank pair and a magnitude per output row",
        magnitude: true,
        staged: false,
    },
    MethodInfo {
        method: Method::Pissa,
        name: "pissa",
        peft_type: "LORA",
        about: "the principal singular directions of the base, trained; the rest frozen",
        magnitude: false,
        staged: true,
    },
];

impl Method {
    /// Its row of the registry.
    pub fn info(self) -> &'static MethodInfo {
        METHODS.iter().find(|row| row.method == self).expect("every method is in the table")
    }

    /// What is typed after `--method`.
    pub fn name(self) -> &'static str {
        self.info().name
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Method {
    type Err = String;

    fn from_str(name: &str) -> Result<Method, String> {
        METHODS.iter().find(|row| row.name == name).map(|row| row.method).ok_or_else(|| {
            let names: Vec<String> = METHODS.iter().map(|row| format!("`{}`", row.name)).collect();
            format!("expected one of {}", names.join(", "))
        })
    }
}
