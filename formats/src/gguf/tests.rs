//! Round trips through writer and reader, by hand-built bytes, and against independent readers.

use super::*;

#[test]
fn a_file_we_write_reads_back_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.gguf");
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", Value::String("llama".into()));
    metadata.insert("list", Value::Array(Array::String(vec!["a".into(), "b".into()])));
    let decls = [TensorDecl { name: "x".into(), shape: vec![4, 2], dtype: GgmlType::F32 }];
    let mut writer = GgufWriter::create(&path, &metadata, &decls).unwrap();
    writer.write("x", &[1; 16]).unwrap();
    writer.write("x", &[2; 16]).unwrap();
    writer.finish().unwrap();
    let file = GgufFile::open(&path).unwrap();
    assert_eq!(file.metadata(), &metadata);
    let x = file.require("x").unwrap();
    assert_eq!((x.row_len(), x.n_rows(), x.dtype().unwrap()), (4, 2, GgmlType::F32));
    assert_eq!(&file.bytes(x)[12..20], &[1, 1, 1, 1, 2, 2, 2, 2]);
}
