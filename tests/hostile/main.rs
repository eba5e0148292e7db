//! Hostile input above the formats: tokenizers, chat templates and models, replayed and damaged.
//!
//! `cargo fuzz` runs the same functions for as long as one likes; see `formats/fuzz/README.md`.

#[path = "../../formats/tests/hostile/alloc.rs"]
mod alloc;
mod bad_vocabularies;
#[path = "../../formats/tests/hostile/seeds.rs"]
#[allow(dead_code, reason = "its seeds of other targets are not needed here")]
mod formats_seeds;
mod model;
#[path = "../../formats/tests/hostile/mutate.rs"]
mod mutate;
mod seeds;
#[path = "../../formats/tests/hostile/smoke.rs"]
mod smoke;
#[path = "../../formats/tests/hostile/target.rs"]
mod target;
mod targets;

use std::path::{Path, PathBuf};

fn testdata() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata")
}

#[track_caller]
fn holds(name: &str, cases: u32) {
    let target = targets::TARGETS
        .iter()
        .chain([&model::MODEL])
        .find(|target| target.name == name)
        .expect("it is in the table");
    let regressions = testdata().join("fuzz");
    let seeds = seeds::seeds(name, &testdata());
    smoke::store(target, &seeds, &regressions);
    smoke::smoke(target, &seeds, &regressions, cases);
}

#[test]
fn any_metadata_are_a_tokenizer_or_an_error() {
    holds("tokenizer_gguf", 1000);
}

#[test]
fn any_tokenizer_files_are_a_tokenizer_or_an_error() {
    holds("tokenizer_hf", 600);
}

#[test]
fn any_text_is_a_chat_template_or_an_error() {
    holds("chat_template", 1000);
}

#[test]
fn any_gguf_file_is_a_model_or_an_error() {
    holds("model", 1000);
}

#[test]
fn every_target_has_its_test() {
    let tests = include_str!("main.rs");
    for target in targets::TARGETS {
        assert!(tests.contains(&format!("holds(\"{}\", ", target.name)), "`{}` has no test", target.name);
    }
}
