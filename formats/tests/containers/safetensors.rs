//! safetensors files and checkpoint folders: against the reference implementation, and what is refused.

use ::safetensors::SafeTensors;
use half::{bf16, f16};
use qpeft_formats::error::Kind;
use qpeft_formats::file::Bytes;
use qpeft_formats::safetensors::{
    Checkpoint, Dtype, SafetensorsFile, TensorRef, write_safetensors, write_safetensors_f32,
};
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use super::testdata;

fn pt() -> BTreeMap<String, String> {
    BTreeMap::from([("format".to_owned(), "pt".to_owned())])
}

#[test]
fn what_is_written_is_what_the_reference_implementation_writes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    let tensors: [TensorRef; 5] = [
        ("b", Dtype::F16, &[3], &[1, 2, 3, 4, 5, 6]),
        ("z", Dtype::F32, &[1, 2], &[9; 8]),
        ("a", Dtype::F32, &[], &[7; 4]),
        ("i", Dtype::I64, &[0, 5], &[]),
        ("quote \" and \u{e9}", Dtype::U8, &[1], &[8]),
    ];
    write_safetensors(&path, &tensors, &pt()).unwrap();
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (*name, ::safetensors::tensor::TensorView::new(*dtype, shape.to_vec(), bytes).unwrap())
    });
    let reference = ::safetensors::serialize(views, Some(HashMap::from_iter(pt()))).unwrap();
    assert_eq!(fs::read(&path).unwrap(), reference);

    let file = SafetensorsFile::open(&path).unwrap();
    assert_eq!(file.metadata(), &pt());
    assert_eq!(file.names().len(), 5);
    for (name, dtype, shape, bytes) in tensors {
        let view = file.require(name).unwrap();
        assert_eq!((view.dtype, view.shape.as_slice(), &view.bytes[..]), (dtype, shape, bytes));
    }
    assert!(file.tensor("absent").is_none());
    assert!(matches!(file.require("absent").unwrap_err().kind, Kind::MissingTensor));
}

#[test]
fn files_of_other_programs_read_as_the_reference_implementation_reads_them() {
    for name in ["models/tiny-mistral/model.safetensors", "peft/fp32/dora/trained/adapter_model.safetensors"]
    {
        let bytes = fs::read(testdata(name)).unwrap();
        let theirs = SafeTensors::deserialize(&bytes).unwrap();
        let ours = SafetensorsFile::open(&testdata(name)).unwrap();
        assert_eq!(ours.names().len(), theirs.len());
        for (name, theirs) in theirs.iter() {
            let ours = ours.require(name).unwrap();
            assert_eq!(
                (ours.dtype, &ours.shape[..], &ours.bytes[..]),
                (theirs.dtype(), theirs.shape(), theirs.data())
            );
        }
    }
}

#[test]
fn floats_of_every_width_become_f32() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    let values = [1.5_f32, -0.25, 0.0, 65504.0];
    let f16s: Vec<u8> = values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect();
    let bf16s: Vec<u8> = values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
    let f32s: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    let f64s: Vec<u8> = values.iter().flat_map(|&x| f64::from(x).to_le_bytes()).collect();
    let tensors: [TensorRef; 5] = [
        ("f16", Dtype::F16, &[4], &f16s),
        ("bf16", Dtype::BF16, &[4], &bf16s),
        ("f32", Dtype::F32, &[4], &f32s),
        ("f64", Dtype::F64, &[4], &f64s),
        ("i64", Dtype::I64, &[1], &[0; 8]),
    ];
    write_safetensors(&path, &tensors, &BTreeMap::new()).unwrap();
    let file = SafetensorsFile::open(&path).unwrap();
    for name in ["f16", "f32", "f64"] {
        assert_eq!(file.require(name).unwrap().to_f32().unwrap(), values, "{name}");
    }
    // bfloat16 keeps 8 bits of the largest half.
    assert_eq!(file.require("bf16").unwrap().to_f32().unwrap(), [1.5, -0.25, 0.0, 65536.0]);
    let error = file.require("i64").unwrap().to_f32().unwrap_err();
    assert_eq!(
        error.to_string(),
        "tensor `i64`: elements are of type I64, which cannot be converted to f32; \
         supported: F32, F16, BF16, F64, F8_E4M3, F8_E5M2"
    );
}

#[test]
fn f32_tensors_are_written_from_slices() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    let tensors: [(&str, &[usize], &[f32]); 2] =
        [("b", &[2, 1], &[1.0, f32::MIN_POSITIVE]), ("a", &[1], &[-0.0])];
    write_safetensors_f32(&path, tensors, &pt()).unwrap();
    let file = SafetensorsFile::open(&path).unwrap();
    for (name, shape, data) in tensors {
        let view = file.require(name).unwrap();
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!((view.shape.as_slice(), bits(&view.to_f32().unwrap())), (shape, bits(data)));
    }
}

#[test]
fn the_writer_refuses_what_the_reader_would_refuse() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    let refuse = |tensors: &[TensorRef]| {
        let error = write_safetensors(&path, tensors, &BTreeMap::new()).unwrap_err();
        assert_eq!(error.path.as_deref(), Some(path.as_path()));
        error.kind
    };
    let kind = refuse(&[("a", Dtype::F32, &[2], &[0; 7])]);
    assert!(matches!(kind, Kind::WrongLength { expected: 8, found: 7 }));
    let kind = refuse(&[("a", Dtype::U8, &[1], &[0]), ("a", Dtype::U8, &[1], &[0])]);
    assert!(matches!(kind, Kind::DuplicateTensor));
    assert!(matches!(refuse(&[("__metadata__", Dtype::U8, &[1], &[0])]), Kind::DuplicateTensor));
    assert!(matches!(refuse(&[("", Dtype::U8, &[1], &[0])]), Kind::EmptyTensorName));
    assert!(matches!(refuse(&[("a", Dtype::U8, &[1 << 40, 1 << 40], &[])]), Kind::SizeOverflow { .. }));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_file_without_tensors_is_read() {
    let bytes = super::build::safetensors("{}", 0);
    let file = SafetensorsFile::from_bytes(Path::new("a"), Bytes::from(bytes)).unwrap();
    assert_eq!(file.names().len(), 0);
}

/// A sharded checkpoint: `a` and `b` in the first file, `c` in the second.
fn sharded(dir: &Path) {
    fs::write(dir.join("config.json"), r#"{"model_type": "llama", "hidden_size": 8}"#).unwrap();
    let shard = |name: &str, tensors: &[&'static str]| {
        let tensors = tensors.iter().map(|&t| (t, [1].as_slice(), [1.0_f32].as_slice()));
        let tensors: Vec<(&str, &[usize], &[f32])> = tensors.collect();
        write_safetensors_f32(&dir.join(name), tensors, &pt()).unwrap();
    };
    shard("model-00001-of-00002.safetensors", &["a", "b"]);
    shard("model-00002-of-00002.safetensors", &["c"]);
    let index = r#"{"metadata": {"total_size": 12}, "weight_map": {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00001-of-00002.safetensors",
        "c": "model-00002-of-00002.safetensors"}}"#;
    fs::write(dir.join("model.safetensors.index.json"), index).unwrap();
}

#[test]
fn a_sharded_checkpoint_reads_as_one() {
    let dir = tempfile::tempdir().unwrap();
    sharded(dir.path());
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(checkpoint.config()["hidden_size"], 8);
    assert_eq!(checkpoint.require("c").unwrap().to_f32().unwrap(), [1.0]);
    assert!(matches!(checkpoint.require("d").unwrap_err().kind, Kind::MissingTensor));
}

#[test]
fn the_fingerprint_of_a_checkpoint_covers_weights_and_configuration() {
    let dir = tempfile::tempdir().unwrap();
    sharded(dir.path());
    let fingerprint = || Checkpoint::open(dir.path()).unwrap().fingerprint().unwrap();
    let first = fingerprint();
    assert!(first.starts_with("blake3:") && first.len() == 71);
    assert_eq!(fingerprint(), first);
    fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    assert_eq!(fingerprint(), first, "other files do not count");
    fs::write(dir.path().join("config.json"), r#"{"model_type": "llama", "hidden_size": 9}"#).unwrap();
    let second = fingerprint();
    assert_ne!(second, first);
    let c: [(&str, &[usize], &[f32]); 1] = [("c", &[1], &[2.0])];
    write_safetensors_f32(&dir.path().join("model-00002-of-00002.safetensors"), c, &pt()).unwrap();
    assert_ne!(fingerprint(), second);
}

#[test]
fn a_checkpoint_with_missing_or_ambiguous_parts_is_refused() {
    let fresh = || {
        let dir = tempfile::tempdir().unwrap();
        sharded(dir.path());
        dir
    };
    let refuse = |dir: &Path| Checkpoint::open(dir).unwrap_err();
    let index = "model.safetensors.index.json";

    let dir = fresh();
    fs::remove_file(dir.path().join("config.json")).unwrap();
    let error = refuse(dir.path());
    assert!(matches!(error.kind, Kind::Io(_)) && error.path.unwrap().ends_with("config.json"));

    let dir = fresh();
    fs::write(dir.path().join("config.json"), "{").unwrap();
    assert!(matches!(refuse(dir.path()).kind, Kind::Json(_)));

    let dir = fresh();
    fs::remove_file(dir.path().join(index)).unwrap();
    assert!(matches!(refuse(dir.path()).kind, Kind::NoWeights));

    let dir = fresh();
    fs::remove_file(dir.path().join("model-00002-of-00002.safetensors")).unwrap();
    let error = refuse(dir.path());
    assert!(matches!(&error.kind, Kind::MissingShard { shard } if shard.contains("00002")), "{error}");

    for name in ["../evil.safetensors", "/etc/passwd", "..", "", "a/b.safetensors"] {
        let dir = fresh();
        let text = format!(r#"{{"weight_map": {{"a": "{name}"}}}}"#);
        fs::write(dir.path().join(index), text).unwrap();
        let error = refuse(dir.path());
        assert!(matches!(error.kind, Kind::BadShardName { .. }), "{name}: {error}");
    }

    let dir = fresh();
    let text = fs::read_to_string(dir.path().join(index)).unwrap();
    let moved = text.replace(r#""b": "model-00001"#, r#""b": "model-00002"#);
    fs::write(dir.path().join(index), moved).unwrap();
    let error = refuse(dir.path());
    assert!(matches!(&error.kind, Kind::NotInShard { shard } if shard.contains("00002")), "{error}");

    let dir = fresh();
    let repeated = text.replace(r#""b":"#, r#""a":"#);
    fs::write(dir.path().join(index), repeated).unwrap();
    let error = refuse(dir.path());
    assert!(error.to_string().contains("key `a` appears twice"), "{error}");

    let dir = fresh();
    let both: [(&str, &[usize], &[f32]); 2] = [("c", &[1], &[1.0]), ("a", &[1], &[1.0])];
    write_safetensors_f32(&dir.path().join("model-00002-of-00002.safetensors"), both, &pt()).unwrap();
    let error = refuse(dir.path());
    assert!(matches!(error.kind, Kind::TensorInTwoShards { .. }), "{error}");
}
