//! The targets of the ordinary tests, for the fuzzer: one binary each in `targets`.

#[path = "../../tests/hostile"]
pub mod formats {
    //! What `formats/tests/hostile` runs.

    pub mod alloc;
    pub mod target;
    pub mod targets;
}

/// Runs a target of the table on an input.
///
/// # Panics
/// The target does not hold, or there is none of this name.
pub fn check(name: &str, data: &[u8]) {
    let target = formats::targets::TARGETS.iter().find(|target| target.name == name);
    target.expect("the name is in the table").check(data);
}
