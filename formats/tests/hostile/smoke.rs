//! The smoke of a set of targets: every seed, every regression, and a bounded number of damaged seeds.

use std::fs;
use std::path::Path;

use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use super::mutate::{apply, mutations};
use super::target::Target;

/// Larger inputs are replayed, not damaged: what could go wrong in them does in small ones, sooner.
const LONGEST_DAMAGED: usize = 16 << 10;

/// Replays the seeds and the regressions of a target, then `cases` damaged seeds, always the same ones.
///
/// # Panics
/// The target refuses to hold; the message has the input or the changes that led to it.
pub fn smoke(target: &Target, seeds: &[Vec<u8>], regressions: &Path, cases: u32) {
    for (name, bytes) in regressions_of(target, regressions) {
        println!("{name}");
        target.check(&bytes);
    }
    for seed in seeds {
        target.check(seed);
    }
    let small: Vec<Vec<u8>> = seeds.iter().filter(|s| s.len() <= LONGEST_DAMAGED).cloned().collect();
    assert!(!small.is_empty(), "`{}` has no seed to damage", target.name);
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let strategy = (proptest::prelude::any::<proptest::sample::Index>(), mutations());
    let result = runner.run(&strategy, |(seed, mutations)| {
        let mut data = small[seed.index(small.len())].clone();
        for mutation in &mutations {
            apply(&mut data, mutation, &small);
        }
        target.check(&data);
        Ok(())
    });
    if let Err(error) = result {
        panic!("`{}`: {error}", target.name);
    }
}

/// The inputs that once broke a target: `<name of the target>.<what was wrong>`.
fn regressions_of(target: &Target, folder: &Path) -> Vec<(String, Vec<u8>)> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let prefix = format!("{}.", target.name);
    let mut found: Vec<_> = entries
        .map(|entry| entry.expect("the folder can be listed").path())
        .map(|path| (path.file_name().unwrap_or_default().to_string_lossy().into_owned(), path))
        .filter(|(name, _)| name.starts_with(&prefix))
        .map(|(name, path)| (name, fs::read(path).expect("the file can be read")))
        .collect();
    found.sort();
    found
}

/// Writes the seeds of a target, and its regressions, to where `cargo fuzz` looks for them, if the
/// environment names that place in `SEED_CORPUS`.
pub fn store(target: &Target, seeds: &[Vec<u8>], regressions: &Path) {
    let Some(corpus) = std::env::var_os("SEED_CORPUS") else { return };
    let folder = Path::new(&corpus).join(target.name);
    fs::create_dir_all(&folder).expect("the corpus can be written");
    let known = regressions_of(target, regressions);
    for (i, bytes) in seeds.iter().chain(known.iter().map(|(_, bytes)| bytes)).enumerate() {
        fs::write(folder.join(format!("seed-{i:03}")), bytes).expect("the corpus can be written");
    }
}
