//! The inputs that damage starts from: files of `testdata`, cut down where they are large.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use qpeft_formats::GgmlType;
use qpeft_formats::gguf::split::SplitLimit;
use qpeft_formats::gguf::{GgufFile, GgufWriter, Metadata, TensorDecl, Value};
use qpeft_formats::safetensors::{Dtype, SafetensorsFile, write_safetensors, write_safetensors_f32};

use super::target::{pack, scratch};

/// Files of more bytes are no seeds.
const LARGEST: u64 = 64 << 10;

/// The files below `folder` with this extension, sorted by name.
pub fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let (mut found, mut open) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).expect("testdata can be listed") {
            let path = entry.expect("testdata can be listed").path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|e| e == extension)
                && path.metadata().is_ok_and(|about| about.len() <= LARGEST)
            {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// The content of a file.
pub fn read(path: &Path) -> Vec<u8> {
    fs::read(path).expect("testdata can be read")
}

/// The seeds of one of this crate's targets.
pub fn seeds(target: &str, testdata: &Path) -> Vec<Vec<u8>> {
    let all = |extension| files(testdata, extension).iter().map(|path| read(path)).collect::<Vec<_>>();
    match target {
        "gguf" | "gguf_rewrite" => all("gguf"),
        "safetensors" | "safetensors_rewrite" => [all("safetensors"), vec![eight_bits()]].concat(),
        "split" => splits(testdata),
        "imatrix" => [imatrices(testdata, "gguf"), imatrices(testdata, "dat")].concat(),
        "bitsandbytes" => bitsandbytes(testdata),
        "mixture" => mixtures(testdata),
        "checkpoint" => checkpoints(testdata),
        "peft" => adapters(testdata),
        "peft_config" => configs(testdata),
        "blocks" => blocks(testdata),
        "quantize" => rows(testdata),
        other => panic!("no seeds for `{other}`"),
    }
}

/// A safetensors file of F32 zeros.
fn zeros(tensors: &[(&str, &[usize])]) -> Vec<u8> {
    let dir = scratch();
    let path = dir.path().join("a.safetensors");
    let data: Vec<Vec<f32>> = tensors.iter().map(|(_, shape)| vec![0.0; shape.iter().product()]).collect();
    let tensors = tensors.iter().zip(&data).map(|((name, shape), data)| (*name, *shape, &data[..]));
    write_safetensors_f32(&path, tensors, &BTreeMap::new()).expect("a plain file");
    read(&path)
}

/// Matrices of 8-bit floats with scales of every kind.
fn eight_bits() -> Vec<u8> {
    let dir = scratch();
    let path = dir.path().join("a.safetensors");
    let codes: Vec<u8> = (0..8u8).map(|i| i.wrapping_mul(37)).collect();
    let scales: Vec<u8> = [0.5_f32, 2.0, 1.0, 0.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    let tensors: [(&str, Dtype, &[usize], &[u8]); 5] = [
        ("a", Dtype::F8_E4M3, &[2, 4], &codes),
        ("a_scale", Dtype::F32, &[2, 1], &scales[..8]),
        ("a_scale_inv", Dtype::F32, &[2, 2], &scales),
        ("b", Dtype::F8_E5M2, &[2, 4], &codes),
        ("b_scale", Dtype::BF16, &[], &scales[2..4]),
    ];
    write_safetensors(&path, &tensors, &BTreeMap::new()).expect("a plain file");
    read(&path)
}

fn checkpoints(testdata: &Path) -> Vec<Vec<u8>> {
    let config = read(&testdata.join("models/tiny-llama/config.json"));
    let shard = zeros(&[("first", &[2, 2]), ("other", &[3])]);
    let whole = br#"{"metadata": {"total_size": 29}, "weight_map": {"first": "model-00001-of-00002.safetensors", "other": "model-00001-of-00002.safetensors", "second": "model-00002-of-00002.safetensors"}}"#;
    let outside = br#"{"weight_map": {"first": "../model-00001-of-00002.safetensors"}}"#;
    let twice = zeros(&[("first", &[1]), ("second", &[1])]);
    vec![
        pack(&[&config, whole, &shard]),
        pack(&[b"{}", whole, &shard]),
        pack(&[b"{}", outside, &shard]),
        pack(&[b"{}", whole, &twice]),
    ]
}

fn configs(testdata: &Path) -> Vec<Vec<u8>> {
    let mut all: Vec<_> = files(testdata, "json")
        .iter()
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name == "adapter_config.json" || name.starts_with("peft-")
        })
        .map(|path| read(path))
        .collect();
    for patterns in [
        r#""rank_pattern": {"q_proj": 4, "^model\\.layers\\.(0|1)\\..*k_proj": 2}, "alpha_pattern": {"(?<!gate)_proj": 1.5}"#,
        r#""target_modules": "(a|b)*\\1(?=c){3,9}", "layers_to_transform": [0, 3]"#,
        r#""target_modules": "all-linear", "exclude_modules": ["lm_head"], "use_dora": true, "use_rslora": true"#,
    ] {
        all.push(format!(r#"{{"peft_type": "LORA", "r": 2, "lora_alpha": 0.1, {patterns}}}"#).into_bytes());
    }
    all
}

fn adapters(testdata: &Path) -> Vec<Vec<u8>> {
    let factors = zeros(&[
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", &[2, 3]),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight", &[4, 2]),
    ]);
    let magnitude = zeros(&[
        ("base_model.model.up.lora_A.weight", &[2, 3]),
        ("base_model.model.up.lora_B.weight", &[4, 2]),
        ("base_model.model.up.lora_magnitude_vector", &[4]),
    ]);
    let config = |rest: &str| format!(r#"{{"peft_type": "LORA", "r": 2, "lora_alpha": 4, {rest}}}"#);
    let mut all = vec![
        pack(&[config(r#""target_modules": ["q_proj"]"#).as_bytes(), &factors]),
        pack(&[
            config(r#""target_modules": "up", "use_dora": true, "init_lora_weights": "pissa""#).as_bytes(),
            &magnitude,
        ]),
        pack(&[
            config(r#""target_modules": "all-linear", "rank_pattern": {"up": 2}, "use_dora": true"#)
                .as_bytes(),
            &magnitude,
        ]),
    ];
    for path in files(testdata, "safetensors") {
        let config = path.with_file_name("adapter_config.json");
        if path.ends_with("adapter_model.safetensors") && config.is_file() {
            all.push(pack(&[&read(&config), &read(&path)]));
        }
    }
    all
}

/// The files that belong together, one behind the other.
fn splits(testdata: &Path) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for first in files(&testdata.join("bad"), "gguf") {
        let name = first.file_name().unwrap_or_default().to_string_lossy();
        let second = first.with_file_name(name.replace("-00001-of-00002", "-00002-of-00002"));
        if name.contains("-00001-of-00002") {
            all.push(if second.is_file() { [read(&first), read(&second)].concat() } else { read(&first) });
        }
    }
    // Two that do belong together.
    let tensors: [(&str, &[u64]); 2] = [("a", &[2, 2]), ("b", &[3])];
    all.push(gguf(&Metadata::new(), &tensors, Some(SplitLimit::Tensors(1))));
    all
}

/// A GGUF file of F32 tensors, or the files of a split one behind each other.
fn gguf(metadata: &Metadata, tensors: &[(&str, &[u64])], limit: Option<SplitLimit>) -> Vec<u8> {
    let decls: Vec<_> = tensors
        .iter()
        .map(|(name, shape)| TensorDecl { name: (*name).into(), shape: shape.to_vec(), dtype: GgmlType::F32 })
        .collect();
    let dir = scratch();
    let path = dir.path().join("a.gguf");
    let writer = match limit {
        None => GgufWriter::create(&path, metadata, &decls),
        Some(limit) => GgufWriter::create_split(&path, metadata, &decls, limit),
    };
    let mut writer = writer.expect("a plain file");
    for decl in &decls {
        let data = vec![0x3c; 4 * decl.shape.iter().product::<u64>() as usize];
        writer.write(&decl.name, &data).expect("in order");
    }
    writer.finish().expect("complete");
    files(dir.path(), "gguf").iter().flat_map(|path| read(path)).collect()
}

fn imatrices(testdata: &Path, extension: &str) -> Vec<Vec<u8>> {
    let is_imatrix = |path: &&PathBuf| path.to_string_lossy().contains("imatrix");
    files(testdata, extension).iter().filter(is_imatrix).map(|path| read(path)).collect()
}

/// Each weight of the golden files by itself.
fn bitsandbytes(testdata: &Path) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for (name, config) in [
        (
            "quantized",
            r#"{"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": true}}"#,
        ),
        ("int8", r#"{"quantization_config": {"load_in_8bit": true}}"#),
    ] {
        let file = SafetensorsFile::open(&testdata.join(format!("bitsandbytes/{name}.safetensors")));
        let file = file.expect("a golden file");
        let weights: BTreeSet<&str> = file
            .names()
            .filter_map(|name| name.split_once(".weight").or(name.split_once(".SCB")))
            .map(|(module, _)| module)
            .collect();
        for module in weights {
            let views: Vec<_> = file
                .names()
                .filter(|name| name.starts_with(&format!("{module}.")))
                .filter_map(|name| file.tensor(name))
                .collect();
            let bytes: usize = views.iter().map(|view| view.bytes.len()).sum();
            if bytes > 6 << 10 {
                continue;
            }
            let dir = scratch();
            let path = dir.path().join("a.safetensors");
            let refs: Vec<_> = views.iter().map(|v| (&*v.name, v.dtype, &v.shape[..], &*v.bytes)).collect();
            write_safetensors(&path, &refs, &BTreeMap::new()).expect("a plain file");
            all.push(pack(&[config.as_bytes(), &read(&path)]));
        }
    }
    all
}

/// Small models whose tensors have the roles that the rules ask for.
fn mixtures(testdata: &Path) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for (arch, experts) in [("llama", 0), ("llama", 8), ("falcon", 0), ("qwen2", 0)] {
        let mut metadata = Metadata::new();
        metadata.insert("general.architecture", Value::String(arch.into()));
        for (key, value) in [
            ("block_count", 2),
            ("attention.head_count", 8),
            ("attention.head_count_kv", 2),
            ("expert_count", experts),
        ] {
            metadata.insert(format!("{arch}.{key}"), Value::U32(value));
        }
        let mut tensors: Vec<(String, Vec<u64>)> =
            vec![("token_embd.weight".into(), vec![256, 2]), ("output.weight".into(), vec![32, 2])];
        for layer in 0..2 {
            for name in
                ["attn_v", "attn_qkv", "attn_output", "ffn_down", "ffn_gate_exps", "ffn_up", "attn_norm"]
            {
                tensors
                    .push((format!("blk.{layer}.{name}.weight"), vec![if layer == 0 { 256 } else { 96 }, 1]));
            }
        }
        let tensors: Vec<_> = tensors.iter().map(|(name, shape)| (&**name, &shape[..])).collect();
        all.push(gguf(&metadata, &tensors, None));
    }
    all.extend(files(&testdata.join("ggml"), "gguf").iter().map(|path| read(path)));
    all
}

/// The first blocks of every type: golden ones where `testdata/ggml` has them, else counting bytes.
fn blocks(testdata: &Path) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for (index, dtype) in GgmlType::ALL.into_iter().enumerate() {
        let len = 2 * dtype.block_bytes();
        let golden = testdata.join(format!("ggml/{dtype}.gguf"));
        let bytes = if golden.is_file() {
            let file = GgufFile::open(&golden).expect("a golden file");
            let tensor =
                file.tensors().iter().find(|t| t.dtype == dtype).expect("it is named after the type");
            file.bytes(tensor)[..len].to_vec()
        } else {
            (0..len).map(|i| (i * 37 + 11) as u8).collect()
        };
        all.push([&[index as u8][..], &bytes].concat());
    }
    all
}

/// A row of every type: random-looking, constant, zero, with an outlier.
fn rows(testdata: &Path) -> Vec<Vec<u8>> {
    let file = SafetensorsFile::open(&testdata.join("ggml/blocks.safetensors"));
    let file = file.expect("a golden file");
    let values = file.require("F32.blk.2.ffn_up.weight").expect("the edge cases").bytes;
    let mut all = Vec::new();
    for (index, dtype) in GgmlType::ALL.into_iter().enumerate() {
        let len = 4 * dtype.block_len().max(32);
        for (row, chunk) in values.chunks_exact(len).take(2).enumerate() {
            let mut bytes = chunk.to_vec();
            if row == 1 {
                bytes[..4].copy_from_slice(&1e30_f32.to_le_bytes());
            }
            all.push([&[index as u8][..], &bytes].concat());
        }
    }
    all
}
