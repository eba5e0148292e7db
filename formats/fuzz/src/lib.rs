//! The targets of the ordinary tests, for the fuzzer: one binary each in `targets`.

// The targets of the root package name it; here its tokenizers and templates are built by themselves.
extern crate self as qpeft;

#[path = "../../tests/hostile"]
mod formats {
    //! What `formats/tests/hostile` runs.

    pub mod alloc;
    pub mod quantized;
    #[allow(dead_code, reason = "seeds are packed by the tests")]
    pub mod target;
    pub mod targets;
}

#[path = "../../../tests/hostile"]
mod above {
    //! What `tests/hostile` runs, but the model: its kernels take long to build, and do not read files.

    pub use super::formats::target;

    pub mod targets;
}

#[path = "../../../src/model"]
pub mod model {
    //! The two modules of the root package that read files and need nothing but formats.

    pub mod chat;
    pub mod tokenizer;
}

/// Runs a target of the tables on an input.
///
/// # Panics
/// The target does not hold, or there is none of this name.
pub fn check(name: &str, data: &[u8]) {
    let mut all = formats::targets::TARGETS.iter().chain(above::targets::TARGETS);
    all.find(|target| target.name == name).expect("the name is in a table").check(data);
}
