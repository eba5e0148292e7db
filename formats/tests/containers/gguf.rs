//! GGUF files: against golden files and an independent reader, and what is refused.

use qpeft_formats::GgmlType;
use qpeft_formats::error::{Kind, Place};
use qpeft_formats::file::Bytes;
use qpeft_formats::gguf::names::{hf_tensor, rows_to_hf};
use qpeft_formats::gguf::split::SplitLimit;
use qpeft_formats::gguf::{Array, GgufFile, GgufWriter, Metadata, TensorDecl, Value};
use qpeft_formats::safetensors::Checkpoint;
use std::fs;
use std::path::{Path, PathBuf};

use super::build::Gguf;
use super::testdata;

/// One value of every type.
fn every_value() -> Metadata {
    let mut metadata = Metadata::new();
    let mut put = |key: &str, value| assert_eq!(metadata.insert(key, value), None);
    put("general.architecture", Value::String("llama".into()));
    put("z.u8", Value::U8(250));
    put("z.i8", Value::I8(-3));
    put("z.u16", Value::U16(65000));
    put("z.i16", Value::I16(-300));
    put("a.u32", Value::U32(4_000_000_000));
    put("a.i32", Value::I32(-70000));
    put("a.f32", Value::F32(1.5));
    put("a.bool", Value::Bool(true));
    put("m.u64", Value::U64(1 << 60));
    put("m.i64", Value::I64(-(1 << 60)));
    put("m.f64", Value::F64(0.1));
    put("unknown.key \u{e9}", Value::String("line\nbreak \u{1f600}".into()));
    put("l.u8", Value::Array(Array::U8(vec![1, 2])));
    put("l.i8", Value::Array(Array::I8(vec![-1, 2])));
    put("l.u16", Value::Array(Array::U16(vec![1, 65000])));
    put("l.i16", Value::Array(Array::I16(vec![-1, 2])));
    put("l.u32", Value::Array(Array::U32(vec![1, 2])));
    put("l.i32", Value::Array(Array::I32(vec![1, -2])));
    put("l.f32", Value::Array(Array::F32(vec![0.25, -2.0])));
    put("l.bool", Value::Array(Array::Bool(vec![true, false])));
    put("l.string", Value::Array(Array::String(vec![String::new(), "b".into()])));
    put("l.u64", Value::Array(Array::U64(vec![1, u64::MAX])));
    put("l.i64", Value::Array(Array::I64(vec![i64::MIN])));
    put("l.f64", Value::Array(Array::F64(vec![])));
    metadata
}

fn decl(name: &str, shape: &[u64], dtype: GgmlType) -> TensorDecl {
    TensorDecl { name: name.into(), shape: shape.to_vec(), dtype }
}

/// Tensors whose sizes leave something to pad, of every kind of shape.
fn every_shape() -> Vec<TensorDecl> {
    vec![
        decl("scalar", &[], GgmlType::F32),
        decl("vector", &[7], GgmlType::F16),
        decl("empty", &[32, 0], GgmlType::Q8_0),
        decl("matrix", &[256, 3], GgmlType::Q4_K),
        decl("deep", &[32, 2, 1, 3], GgmlType::Q5_1),
        decl("last", &[3], GgmlType::BF16),
        decl("end", &[0], GgmlType::F32),
    ]
}

fn content(i: usize, size: u64) -> Vec<u8> {
    (0..size).map(|j| (j * 7 + i as u64 * 13 + 1) as u8).collect()
}

#[test]
fn what_is_written_reads_back_at_every_alignment() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.gguf");
    for alignment in [None, Some(1), Some(8), Some(16), Some(32), Some(64), Some(128), Some(256), Some(512)]
        .into_iter()
        .chain([1024, 2048, 4096].map(Some))
    {
        let mut metadata = every_value();
        if let Some(alignment) = alignment {
            metadata.insert("general.alignment", Value::U32(alignment));
        }
        let decls = every_shape();
        let mut writer = GgufWriter::create(&path, &metadata, &decls).unwrap();
        for (i, decl) in decls.iter().enumerate() {
            let elements: u64 = decl.shape.iter().product();
            let size = elements / decl.dtype.block_len() as u64 * decl.dtype.block_bytes() as u64;
            // In three parts, the first of them empty.
            let bytes = content(i, size);
            let middle = bytes.len() / 3;
            for part in [&bytes[..0], &bytes[..middle], &bytes[middle..]] {
                writer.write(&decl.name, part).unwrap();
            }
        }
        writer.finish().unwrap();

        let file = GgufFile::open(&path).unwrap();
        let alignment = u64::from(alignment.unwrap_or(32));
        assert_eq!((file.version(), file.alignment()), (3, alignment));
        assert_eq!(file.metadata(), &metadata);
        assert_eq!(file.tensors().len(), decls.len());
        for (i, (tensor, decl)) in file.tensors().iter().zip(&decls).enumerate() {
            assert_eq!((&tensor.name, &tensor.shape), (&decl.name, &decl.shape));
            assert_eq!(tensor.dtype, decl.dtype);
            assert_eq!(tensor.offset % alignment, 0);
            assert_eq!(&file.bytes(tensor)[..], content(i, tensor.size));
            assert_eq!(file.tensor(&decl.name), Some(tensor));
        }
        assert_eq!(fs::metadata(&path).unwrap().len() % alignment, 0, "the tail is padded too");
    }
}

#[test]
fn an_independent_reader_finds_what_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.gguf");
    let mut metadata = every_value();
    // That reader takes an array without elements for a truncated file.
    metadata.remove("l.f64");
    // And it knows no BF16.
    let decls: Vec<_> = every_shape().into_iter().filter(|d| d.dtype != GgmlType::BF16).collect();
    let mut writer = GgufWriter::create(&path, &metadata, &decls).unwrap();
    let sizes: Vec<u64> = {
        let probe = decls.iter().map(|d| {
            d.shape.iter().product::<u64>() / d.dtype.block_len() as u64 * d.dtype.block_bytes() as u64
        });
        probe.collect()
    };
    for (decl, size) in decls.iter().zip(&sizes) {
        writer.write(&decl.name, &content(0, *size)).unwrap();
    }
    writer.finish().unwrap();

    let bytes = fs::read(&path).unwrap();
    let theirs = ::gguf::GGUFFile::read(&bytes).unwrap().expect("a complete file");
    let ours = GgufFile::open(&path).unwrap();
    assert_eq!(theirs.header.version, 3);
    let keys: Vec<_> = theirs.header.metadata.iter().map(|m| m.key.as_str()).collect();
    assert_eq!(keys, metadata.iter().map(|(key, _)| key).collect::<Vec<_>>());
    for entry in &theirs.header.metadata {
        use ::gguf::GGUFMetadataValue as Theirs;
        match (metadata.get(&entry.key).unwrap(), &entry.value) {
            (Value::U8(a), Theirs::Uint8(b)) => assert_eq!(a, b),
            (Value::I8(a), Theirs::Int8(b)) => assert_eq!(a, b),
            (Value::U16(a), Theirs::Uint16(b)) => assert_eq!(a, b),
            (Value::I16(a), Theirs::Int16(b)) => assert_eq!(a, b),
            (Value::U32(a), Theirs::Uint32(b)) => assert_eq!(a, b),
            (Value::I32(a), Theirs::Int32(b)) => assert_eq!(a, b),
            (Value::F32(a), Theirs::Float32(b)) => assert_eq!(a, b),
            (Value::Bool(a), Theirs::Bool(b)) => assert_eq!(a, b),
            (Value::U64(a), Theirs::Uint64(b)) => assert_eq!(a, b),
            (Value::I64(a), Theirs::Int64(b)) => assert_eq!(a, b),
            (Value::F64(a), Theirs::Float64(b)) => assert_eq!(a, b),
            (Value::String(a), Theirs::String(b)) => assert_eq!(a, b),
            (Value::Array(a), Theirs::Array(b)) => assert_eq!(a.len() as u64, b.len),
            (ours, theirs) => panic!("`{}`: {ours:?} and {theirs:?}", entry.key),
        }
    }
    for (theirs, ours) in theirs.tensors.iter().zip(ours.tensors()) {
        assert_eq!((&theirs.name, &theirs.dimensions), (&ours.name, &ours.shape));
        assert_eq!((theirs.tensor_type as u32, theirs.offset), (ours.dtype.id(), ours.offset));
    }
}

#[test]
fn version_2_and_wide_alignment_built_by_hand_are_read() {
    for version in [2, 3] {
        let bytes = Gguf::new(version, 2, 2)
            .key_u32("general.alignment", 64)
            .string("truth")
            .u32(7)
            .bytes(&[7])
            .tensor("a", &[3, 2], 0, 0)
            .tensor("b", &[32], 8, 64)
            .data(64, 64 + 34)
            .0;
        let file = GgufFile::from_bytes(Path::new("a.gguf"), Bytes::from(bytes)).unwrap();
        assert_eq!((file.version(), file.alignment()), (version, 64));
        assert_eq!(file.metadata().bool("truth").unwrap(), Some(true), "any byte but zero is true");
        let (a, b) = (file.require("a").unwrap(), file.require("b").unwrap());
        assert_eq!((a.row_len(), a.n_rows(), a.size), (3, 2, 24));
        assert_eq!(&file.bytes(a)[..], (0..24).collect::<Vec<u8>>());
        assert_eq!(&file.bytes(b)[..], (64..98).collect::<Vec<u8>>(), "the last tensor needs no padding");
    }
}

#[test]
fn a_file_without_tensors_needs_no_data() {
    let bytes = Gguf::new(3, 0, 1).key_u32("a", 1).0;
    let file = GgufFile::from_bytes(Path::new("a.gguf"), Bytes::from(bytes)).unwrap();
    assert!(file.tensors().is_empty());
    let bytes = Gguf::new(3, 1, 0).tensor("none", &[0], 0, 0).0;
    let file = GgufFile::from_bytes(Path::new("a.gguf"), Bytes::from(bytes)).unwrap();
    assert_eq!(file.bytes(file.require("none").unwrap()).len(), 0);
}

#[test]
fn a_file_that_says_it_is_one_of_one_is_not_split() {
    let bytes = Gguf::new(3, 0, 1).string("split.count").u32(2).bytes(&1_u16.to_le_bytes()).0;
    GgufFile::from_bytes(Path::new("a.gguf"), Bytes::from(bytes)).unwrap();
}

#[test]
fn files_of_llama_cpp_have_the_layout_that_it_reports() {
    let index = fs::read_to_string(testdata("ggml/index.json")).unwrap();
    let index: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&index).unwrap();
    let mut files = 0;
    for entry in fs::read_dir(testdata("ggml")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "gguf") {
            continue;
        }
        let file = GgufFile::open(&path).unwrap();
        let quant = path.file_stem().unwrap().to_str().unwrap();
        for tensor in file.tensors() {
            let expected = &index[&format!("{quant}.{}", tensor.name)];
            // They list shapes slowest dimension first.
            let mut shape = tensor.shape.clone();
            shape.reverse();
            assert_eq!(serde_json::json!(shape), expected["shape"]);
            assert_eq!(u64::from(tensor.dtype.id()), expected["type_id"]);
            assert_eq!(tensor.dtype.name(), expected["type"]);
            assert_eq!(tensor.size, expected["bytes"]);
            assert_eq!(file.bytes(tensor).len() as u64, tensor.size);
        }
        files += 1;
    }
    assert_eq!(files, 15);
}

#[test]
fn a_model_rewritten_tensor_by_tensor_is_byte_identical() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["models/tiny-llama-256.Q4_K.gguf", "models/tiny-mistral.F32.gguf"] {
        let source = GgufFile::open(&testdata(name)).unwrap();
        let decls: Vec<_> = source
            .tensors()
            .iter()
            .map(|t| TensorDecl { name: t.name.clone(), shape: t.shape.clone(), dtype: t.dtype })
            .collect();
        let path = dir.path().join("copy.gguf");
        let mut writer = GgufWriter::create(&path, source.metadata(), &decls).unwrap();
        for tensor in source.tensors() {
            writer.write(&tensor.name, &source.bytes(tensor)).unwrap();
        }
        writer.finish().unwrap();
        assert!(fs::read(&path).unwrap() == fs::read(testdata(name)).unwrap(), "{name}");
        assert_eq!(GgufFile::open(&path).unwrap().fingerprint().unwrap(), source.fingerprint().unwrap());
    }
}

#[test]
fn converted_weights_are_the_checkpoints_with_q_and_k_permuted() {
    let gguf = GgufFile::open(&testdata("models/tiny-mistral.F32.gguf")).unwrap();
    let hf = Checkpoint::open(&testdata("models/tiny-mistral")).unwrap();
    let metadata = gguf.metadata();
    let heads = metadata.require_u32("llama.attention.head_count").unwrap() as usize;
    let kv_heads = metadata.require_u32("llama.attention.head_count_kv").unwrap() as usize;
    let mut permuted = 0;
    for tensor in gguf.tensors() {
        let name = hf_tensor(&tensor.name).unwrap_or_else(|| panic!("`{}` has no name", tensor.name));
        let expected: Vec<u8> =
            hf.require(&name).unwrap().to_f32().unwrap().iter().flat_map(|x| x.to_le_bytes()).collect();
        let found = gguf.bytes(tensor);
        let n_heads = match () {
            () if tensor.name.ends_with("attn_q.weight") => heads,
            () if tensor.name.ends_with("attn_k.weight") => kv_heads,
            () => {
                assert!(*found == *expected, "{name}");
                continue;
            }
        };
        let head_dim = tensor.n_rows() / n_heads;
        let mut back = vec![0; found.len()];
        rows_to_hf(&mut back, &found, tensor.row_len() * 4, n_heads, head_dim).unwrap();
        assert!(*found != *expected && back == expected, "{name}");
        permuted += 1;
    }
    assert_eq!(permuted, 4);
    assert_eq!(gguf.tensors().len(), hf.names().len());
}

#[test]
fn every_type_number_has_one_name_and_a_size() {
    let types: Vec<_> = (0..100).filter_map(GgmlType::from_id).collect();
    assert_eq!(types.len(), 43 - 8, "ggml has numbers 0 to 42 and removed eight");
    assert_eq!(types.len(), GgmlType::ALL.len());
    for ty in &types {
        assert_eq!(types.iter().filter(|t| t.name() == ty.name()).count(), 1);
        assert_eq!(GgmlType::from_name(&ty.name().to_lowercase()), Some(*ty));
        assert!(ty.block_len() > 0 && ty.block_bytes() > 0);
    }
}

#[test]
fn getters_convert_integers_that_fit_and_name_key_and_types() {
    let metadata = every_value();
    assert_eq!(metadata.u32("z.u8").unwrap(), Some(250));
    assert_eq!(metadata.u32("z.u16").unwrap(), Some(65000));
    assert_eq!(metadata.u64("m.u64").unwrap(), Some(1 << 60));
    assert_eq!(metadata.f32("m.f64").unwrap(), Some(0.1));
    assert_eq!(metadata.i32s("l.u16").unwrap(), Some(vec![1, 65000]));
    assert_eq!(metadata.u32s("l.u8").unwrap(), Some(vec![1, 2]));
    assert_eq!(metadata.f32s("l.f64").unwrap(), Some(vec![]));
    assert_eq!(metadata.strings("l.string").unwrap().unwrap().len(), 2);
    assert_eq!(metadata.require_strings("l.string").unwrap()[1], "b");
    assert_eq!(metadata.require_str("general.architecture").unwrap(), "llama");
    assert_eq!(metadata.require_f32("a.f32").unwrap(), 1.5);
    for absent in [metadata.u32("absent").unwrap().is_none(), metadata.str("absent").unwrap().is_none()] {
        assert!(absent);
    }

    let refused = |error: qpeft_formats::Error| error.to_string();
    assert_eq!(refused(metadata.u32("z.i8").unwrap_err()), "key `z.i8`: value -3 does not fit u32");
    assert_eq!(
        refused(metadata.u32("m.u64").unwrap_err()),
        format!("key `m.u64`: value {} does not fit u32", 1_u64 << 60)
    );
    assert_eq!(refused(metadata.u32s("l.i8").unwrap_err()), "key `l.i8`: value -1 does not fit u32");
    assert_eq!(refused(metadata.u32("a.f32").unwrap_err()), "key `a.f32`: is of type f32, expected u32");
    assert_eq!(
        refused(metadata.i32s("l.string").unwrap_err()),
        "key `l.string`: is of type array of string, expected array of i32"
    );
    assert_eq!(refused(metadata.f32("a.u32").unwrap_err()), "key `a.u32`: is of type u32, expected f32");
    assert_eq!(refused(metadata.bool("a.u32").unwrap_err()), "key `a.u32`: is of type u32, expected bool");
    assert_eq!(refused(metadata.str("a.u32").unwrap_err()), "key `a.u32`: is of type u32, expected string");
    assert_eq!(
        refused(metadata.strings("l.u8").unwrap_err()),
        "key `l.u8`: is of type array of u8, expected array of string"
    );
    assert_eq!(
        refused(metadata.f32s("l.u8").unwrap_err()),
        "key `l.u8`: is of type array of u8, expected array of f32"
    );
    assert_eq!(refused(metadata.require_u32("absent").unwrap_err()), "key `absent`: the key is missing");
}

#[test]
fn errors_of_an_open_file_name_the_file() {
    let path = testdata("models/tiny-llama-256.Q4_K.gguf");
    let file = GgufFile::open(&path).unwrap();
    let error = file.metadata().require_str("absent").unwrap_err();
    assert_eq!(error.path.as_deref(), Some(path.as_path()));
    let error = file.require("blk.9.attn_q.weight").unwrap_err();
    assert_eq!(error.path.as_deref(), Some(path.as_path()));
    assert!(matches!(error.kind, Kind::MissingTensor));
}

#[test]
fn inserting_replaces_in_place_and_removing_keeps_the_order() {
    let mut metadata = Metadata::new();
    for key in ["a", "b", "c", "d"] {
        metadata.insert(key, Value::U8(0));
    }
    assert_eq!(metadata.insert("b", Value::U8(1)), Some(Value::U8(0)));
    assert_eq!(metadata.remove("c"), Some(Value::U8(0)));
    assert_eq!(metadata.remove("c"), None);
    assert_eq!(metadata.iter().map(|(key, _)| key).collect::<Vec<_>>(), ["a", "b", "d"]);
    assert_eq!(metadata.get("b"), Some(&Value::U8(1)));
    let mut other = metadata.clone();
    other.remove("a");
    other.insert("a", Value::U8(0));
    assert_ne!(metadata, other, "order counts");
}

#[test]
fn the_writer_takes_exactly_the_declared_bytes_in_the_declared_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.gguf");
    let decls = [decl("a", &[4], GgmlType::F32), decl("b", &[2], GgmlType::F32)];
    let create = || GgufWriter::create(&path, &Metadata::new(), &decls).unwrap();

    let error = create().write("b", &[0; 8]).unwrap_err();
    assert!(matches!(&error.kind, Kind::OutOfOrder { expected } if **expected == *"a"), "{error}");
    let error = create().write("c", &[0; 8]).unwrap_err();
    assert!(matches!(error.kind, Kind::UndeclaredTensor), "{error}");
    let error = create().write("a", &[0; 17]).unwrap_err();
    assert!(matches!(error.kind, Kind::WrongLength { expected: 16, found: 17 }), "{error}");

    let mut writer = create();
    writer.write("a", &[0; 16]).unwrap();
    let error = writer.write("a", &[0; 4]).unwrap_err();
    assert!(matches!(error.kind, Kind::WrongLength { expected: 16, found: 20 }), "{error}");
    writer.write("b", &[0; 7]).unwrap();
    let error = writer.finish().unwrap_err();
    assert!(matches!(error.kind, Kind::WrongLength { expected: 8, found: 7 }), "{error}");
    assert_eq!(error.place, Place::Tensor("b".into()));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");
}

#[test]
fn the_writer_refuses_what_the_reader_would_refuse() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.gguf");
    let refuse = |key: &str, value: Value, decls: &[TensorDecl]| {
        let mut metadata = Metadata::new();
        metadata.insert(key, value);
        let error = GgufWriter::create(&path, &metadata, decls).unwrap_err();
        assert_eq!(error.path.as_deref(), Some(path.as_path()));
        error.kind
    };
    let fine = || Value::U32(1);
    assert!(matches!(refuse("", fine(), &[]), Kind::EmptyKey));
    let kind = refuse("general.alignment", Value::U32(24), &[]);
    assert!(matches!(kind, Kind::BadAlignment { found: 24, .. }));
    assert!(matches!(refuse("general.alignment", Value::U64(32), &[]), Kind::WrongValueType { .. }));
    assert!(matches!(refuse("split.count", Value::U16(2), &[]), Kind::SplitFile { number: 1, count: 2 }));
    let kind = refuse("a", fine(), &[decl("", &[1], GgmlType::F32)]);
    assert!(matches!(kind, Kind::EmptyTensorName));
    let kind = refuse("a", fine(), &[decl(&"x".repeat(64), &[1], GgmlType::F32)]);
    assert!(matches!(kind, Kind::TooLong { found: 64, limit: 63, .. }));
    let twice = [decl("x", &[1], GgmlType::F32), decl("x", &[1], GgmlType::F32)];
    assert!(matches!(refuse("a", fine(), &twice), Kind::DuplicateTensor));
    let kind = refuse("a", fine(), &[decl("x", &[1; 5], GgmlType::F32)]);
    assert!(matches!(kind, Kind::TooManyDims { found: 5, limit: 4 }));
    let kind = refuse("a", fine(), &[decl("x", &[100], GgmlType::Q4_K)]);
    assert!(matches!(kind, Kind::PartialBlock { block_len: 256, row_len: 100, .. }));
    let kind = refuse("a", fine(), &[decl("x", &[1 << 40, 1 << 40], GgmlType::F32)]);
    assert!(matches!(kind, Kind::SizeOverflow { .. }));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// A model of six tensors of 64 bytes, one of them empty, in files of `limit`.
fn split_model(dir: &Path, limit: SplitLimit) -> PathBuf {
    let path = dir.join("m.gguf");
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", Value::String("llama".into()));
    metadata.insert("general.alignment", Value::U32(64));
    metadata.insert("general.name", Value::String("m".into()));
    let decls: Vec<_> = ["a", "b", "c", "d", "e", "f"]
        .iter()
        .map(|name| decl(name, &[if *name == "e" { 0 } else { 16 }], GgmlType::F32))
        .collect();
    let mut writer = GgufWriter::create_split(&path, &metadata, &decls, limit).unwrap();
    for (i, decl) in decls.iter().enumerate().filter(|(_, decl)| decl.shape != [0]) {
        assert_eq!(fs::read_dir(dir).unwrap().filter(|e| is_final(e.as_ref().unwrap())).count(), 0);
        writer.write(&decl.name, &[i as u8; 40]).unwrap();
        writer.write(&decl.name, &[i as u8; 24]).unwrap();
    }
    writer.finish().unwrap();
    path
}

fn is_final(entry: &fs::DirEntry) -> bool {
    !entry.file_name().to_str().unwrap().starts_with('.')
}

#[test]
fn a_split_model_is_written_in_files_and_read_as_one() {
    for (limit, files) in [
        (SplitLimit::Tensors(2), 3),
        (SplitLimit::Tensors(4), 2),
        (SplitLimit::Bytes(128), 3),
        (SplitLimit::Bytes(100), 5),
        (SplitLimit::Bytes(1), 6),
        (SplitLimit::Bytes(1 << 30), 1),
    ] {
        let dir = tempfile::tempdir().unwrap();
        split_model(dir.path(), limit);
        let first = dir.path().join(format!("m-00001-of-{files:05}.gguf"));
        let model = GgufFile::open(&first).unwrap();
        assert_eq!(model.paths().len(), files, "{limit:?}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), files);
        assert_eq!(model.path(), first);
        let names: Vec<_> = model.tensors().iter().map(|t| t.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "c", "d", "e", "f"]);
        for (i, tensor) in model.tensors().iter().enumerate() {
            assert_eq!(&model.bytes(tensor)[..], &vec![i as u8; tensor.size as usize], "{limit:?}");
        }
        let keys: Vec<_> = model.metadata().iter().map(|(key, _)| key.to_owned()).collect();
        if files == 1 {
            assert_eq!(keys[3..], ["split.no", "split.tensors.count", "split.count"]);
            assert_eq!(model.fingerprint().unwrap(), qpeft_formats::file::fingerprint(&first).unwrap());
            continue;
        }
        assert_eq!(keys, ["general.architecture", "general.alignment", "general.name"]);
        // The identity changes with the content of any file.
        let before = model.fingerprint().unwrap();
        let last = model.paths().last().unwrap().to_owned();
        let mut bytes = fs::read(&last).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&last, bytes).unwrap();
        assert_ne!(GgufFile::open(&first).unwrap().fingerprint().unwrap(), before);
        let error = GgufFile::open(&last).unwrap_err();
        assert!(matches!(error.kind, Kind::SplitFile { number, .. } if number == files as u64), "{error}");
    }
}

#[test]
fn an_unfinished_split_model_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let decls = [decl("a", &[2], GgmlType::F32), decl("b", &[2], GgmlType::F32)];
    let create = |decls: &[TensorDecl]| {
        GgufWriter::create_split(&path, &Metadata::new(), decls, SplitLimit::Tensors(1))
    };
    let mut writer = create(&decls).unwrap();
    writer.write("a", &[0; 8]).unwrap();
    assert!(matches!(writer.write("a", &[0]).unwrap_err().kind, Kind::WrongLength { found: 9, .. }));
    writer.write("b", &[0; 7]).unwrap();
    let error = writer.finish().unwrap_err();
    assert!(matches!(error.kind, Kind::WrongLength { expected: 8, found: 7 }), "{error}");
    let mut writer = create(&decls).unwrap();
    assert!(matches!(writer.write("b", &[0]).unwrap_err().kind, Kind::OutOfOrder { .. }));
    drop(writer);
    let twice = [decls[0].clone(), decls[0].clone()];
    assert!(matches!(create(&twice).unwrap_err().kind, Kind::DuplicateTensor));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_part_can_be_read_without_the_map() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    fs::write(&path, b"0123456789").unwrap();
    let mapped = Bytes::map(&path).unwrap().slice(2..8);
    for bytes in [mapped, Bytes::from(b"xx234567".to_vec()).slice(2..8)] {
        let mut out = [0; 3];
        bytes.read_at(3, &mut out).unwrap();
        assert_eq!(&out, b"567");
    }
}

#[test]
fn rewriting_an_open_model_leaves_its_map_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.gguf");
    let decls = [decl("a", &[2], GgmlType::F32)];
    let write = |byte: u8| {
        let mut writer = GgufWriter::create(&path, &Metadata::new(), &decls).unwrap();
        writer.write("a", &[byte; 8]).unwrap();
        writer.finish().unwrap();
    };
    write(1);
    let old = GgufFile::open(&path).unwrap();
    let bytes = old.bytes(old.require("a").unwrap());
    drop(old);
    write(2);
    assert_eq!(&bytes[..], &[1; 8]);
    let new = GgufFile::open(&path).unwrap();
    assert_eq!(&new.bytes(new.require("a").unwrap())[..], &[2; 8]);
}
