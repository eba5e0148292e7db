//! Memory maps, atomic files and folders, fingerprints.

use qpeft_formats::error::Kind;
use qpeft_formats::file::{AtomicDir, AtomicFile, Bytes, fingerprint, write_atomic};
use std::fs;
use std::path::Path;

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_file_appears_only_when_it_is_committed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.bin");
    fs::write(&path, "old").unwrap();

    let mut file = AtomicFile::create(&path).unwrap();
    file.write(b"ne").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(names(dir.path()), [format!(".a.bin.{}.tmp", std::process::id()), "a.bin".to_owned()]);
    drop(file);
    assert_eq!(names(dir.path()), ["a.bin"]);
    assert_eq!(fs::read(&path).unwrap(), b"old");

    let mut file = AtomicFile::create(&path).unwrap();
    file.write(b"ne").unwrap();
    file.write(b"w").unwrap();
    assert_eq!(file.len(), 3);
    file.commit().unwrap();
    assert_eq!(names(dir.path()), ["a.bin"]);
    assert_eq!(fs::read(&path).unwrap(), b"new");
}

#[test]
fn what_a_killed_process_left_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.bin");
    fs::write(dir.path().join(format!(".a.bin.{}.tmp", std::process::id())), "a much longer leftover")
        .unwrap();
    write_atomic(&path, b"new").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"new");
    assert_eq!(names(dir.path()), ["a.bin"]);
}

#[test]
fn a_folder_appears_only_when_it_is_committed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("step-10");
    for content in ["first", "second"] {
        let staged = AtomicDir::create(&path).unwrap();
        write_atomic(&staged.staging().join("a"), content.as_bytes()).unwrap();
        staged.commit().unwrap();
        assert_eq!(fs::read_to_string(path.join("a")).unwrap(), content);
        assert_eq!(names(dir.path()), ["step-10"]);
    }
    let staged = AtomicDir::create(&path).unwrap();
    write_atomic(&staged.staging().join("a"), b"third").unwrap();
    drop(staged);
    assert_eq!(fs::read_to_string(path.join("a")).unwrap(), "second");
    assert_eq!(names(dir.path()), ["step-10"]);
}

#[test]
fn a_folder_that_cannot_be_written_is_an_error_with_its_path() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing/a.bin");
    let error = write_atomic(&missing, b"x").unwrap_err();
    assert!(error.to_string().starts_with(&format!("`{}`: ", missing.display())), "{error}");
    assert!(matches!(error.kind, Kind::Io(_)) && error.hint().is_some());
    assert!(AtomicDir::create(&missing).is_err());

    fs::write(dir.path().join("file"), "").unwrap();
    let error = write_atomic(&dir.path().join("file/a.bin"), b"x").unwrap_err();
    assert!(matches!(error.kind, Kind::Io(_)));

    let error = write_atomic(Path::new("/"), b"x").unwrap_err();
    assert!(matches!(error.kind, Kind::NotAFile));
}

#[cfg(unix)]
#[test]
fn a_read_only_folder_is_an_error_with_a_hint() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o555)).unwrap();
    if fs::write(dir.path().join("probe"), "").is_ok() {
        println!("skipped: this user may write into read-only folders");
        return;
    }
    let error = write_atomic(&dir.path().join("a.bin"), b"x").unwrap_err();
    assert!(error.hint().unwrap().contains("choose a folder"));
}

#[test]
fn folders_and_missing_files_are_not_mapped() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(Bytes::map(dir.path()).unwrap_err().kind, Kind::NotAFile));
    let missing = dir.path().join("a.gguf");
    let error = Bytes::map(&missing).unwrap_err();
    assert_eq!(error.path.as_deref(), Some(missing.as_path()));
    assert!(matches!(error.kind, Kind::Io(_)));
}

#[test]
fn an_empty_file_maps_to_no_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("empty");
    fs::write(&path, "").unwrap();
    assert_eq!(Bytes::map(&path).unwrap().len(), 0);
}

#[test]
fn slices_of_slices_keep_their_owner_alive() {
    let whole = Bytes::from((0..100).collect::<Vec<u8>>());
    let part = whole.slice(10..60).slice(5..15);
    drop(whole);
    assert_eq!(&part[..], (15..25).collect::<Vec<u8>>());
    assert_eq!(part.slice(10..10).len(), 0);
    assert!(std::panic::catch_unwind(|| part.slice(0..11)).is_err());
}

#[test]
fn the_fingerprint_is_blake3_of_the_content() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    // The official test vector of length 0, and a file longer than the read buffer.
    fs::write(&path, "").unwrap();
    assert_eq!(
        fingerprint(&path).unwrap(),
        "blake3:af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    );
    let long: Vec<u8> = (0..3_000_001_u32).map(|i| (i % 251) as u8).collect();
    fs::write(&path, &long).unwrap();
    assert_eq!(fingerprint(&path).unwrap(), format!("blake3:{}", blake3::hash(&long)));
}
