//! The registry: every method by name. Flags, tables and the error for an unknown name come from here.

/// A training method.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the table below says what they are")]
pub enum Method {
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
