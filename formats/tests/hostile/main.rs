//! Hostile input: the fuzz targets of this crate, replayed and damaged within the ordinary tests.
//!
//! `cargo fuzz` runs the same functions for as long as one likes; see `formats/fuzz/README.md`.

mod alloc;
mod mutate;
mod quantized;
mod seeds;
mod smoke;
mod target;
mod targets;

use std::path::{Path, PathBuf};

fn testdata() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata")
}

/// Damaged seeds per target; all of them together take a few seconds.
const CASES: u32 = 2000;

#[track_caller]
fn holds(name: &str) {
    let target = targets::TARGETS.iter().find(|target| target.name == name).expect("it is in the table");
    let regressions = testdata().join("fuzz");
    let seeds = seeds::seeds(name, &testdata());
    smoke::store(target, &seeds, &regressions);
    smoke::smoke(target, &seeds, &regressions, CASES);
}

#[test]
fn any_bytes_are_a_gguf_file_or_an_error() {
    holds("gguf");
}

#[test]
fn a_gguf_file_that_reads_is_written_and_reads_again() {
    holds("gguf_rewrite");
}

#[test]
fn any_bytes_are_a_safetensors_file_or_an_error() {
    holds("safetensors");
}

#[test]
fn a_safetensors_file_that_reads_is_written_and_reads_again() {
    holds("safetensors_rewrite");
}

#[test]
fn any_index_and_shard_are_a_checkpoint_or_an_error() {
    holds("checkpoint");
}

#[test]
fn an_adapter_that_reads_is_written_and_reads_again() {
    holds("peft");
}

#[test]
fn an_adapter_config_that_reads_is_written_and_reads_again() {
    holds("peft_config");
}

#[test]
fn any_two_files_are_a_split_model_or_an_error() {
    holds("split");
}

#[test]
fn any_bytes_are_an_importance_matrix_or_an_error() {
    holds("imatrix");
}

#[test]
fn any_tensors_are_weights_of_bitsandbytes_or_an_error() {
    holds("bitsandbytes");
}

#[test]
fn any_model_gets_types_that_its_rows_fit() {
    holds("mixture");
}

#[test]
fn any_bytes_are_blocks_of_any_type() {
    holds("blocks");
}

#[test]
fn any_floats_are_quantized_to_any_type() {
    holds("quantize");
}

#[test]
fn the_seeds_of_folders_are_right_before_they_are_damaged() {
    let dir = target::scratch();
    let [config, index, shard] =
        target::unpack::<3>(&seeds::seeds("checkpoint", &testdata())[0]).map(<[u8]>::to_vec);
    targets::place_checkpoint(dir.path(), &config, &index, &shard);
    let folder = qpeft_formats::safetensors::Checkpoint::open(dir.path()).expect("a good folder");
    assert_eq!(folder.names().collect::<Vec<_>>(), ["first", "other", "second"]);
}

#[test]
fn every_target_has_its_test() {
    let tests = include_str!("main.rs");
    for target in targets::TARGETS {
        assert!(tests.contains(&format!("holds(\"{}\");", target.name)), "`{}` has no test", target.name);
    }
}
