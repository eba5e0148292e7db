//! One malformed file for every way to be wrong, in `testdata/bad`, named after the variant.
//!
//! The files are built here; a test holds the stored ones against it, so that neither drifts. To store
//! them again after a change: `BLESS=1 cargo test -p qpeft-formats the_stored_files`.

use qpeft_formats::error::{Kind, Result};
use qpeft_formats::gguf::GgufFile;
use qpeft_formats::imatrix::Imatrix;
use qpeft_formats::peft::PeftConfig;
use qpeft_formats::safetensors::SafetensorsFile;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::build::{Gguf, safetensors};
use super::testdata;

/// File name and bytes. The name is `<format>-<variant>[.<detail>].<extension>`.
type Case = (&'static str, Vec<u8>);

fn gguf() -> Vec<Case> {
    let tensor = |name: &str, shape: &[u64], ty, offset| {
        Gguf::new(3, 1, 0).tensor(name, shape, ty, offset).data(32, 64).0
    };
    let key = |key: &str| Gguf::new(3, 0, 1).string(key);
    let alignment = |value| Gguf::new(3, 0, 1).key_u32("general.alignment", value).0;
    let two = |b: &str, offset| {
        Gguf::new(3, 2, 0).tensor("a", &[2], 0, 0).tensor(b, &[2], 0, offset).data(32, 64).0
    };
    vec![
        ("gguf-not-gguf.gguf", b"GGML\x03\0\0\0".to_vec()),
        ("gguf-truncated.empty.gguf", Vec::new()),
        ("gguf-truncated.magic.gguf", b"GGU".to_vec()),
        ("gguf-truncated.version.gguf", b"GGUF\x03".to_vec()),
        ("gguf-truncated.value.gguf", key("a key that is long enough").u32(12).bytes(&[0; 3]).0),
        ("gguf-truncated.tensor.gguf", Gguf::new(3, 1, 0).string("a tensor").u32(4).bytes(&[0; 20]).0),
        ("gguf-truncated.string.gguf", key("key").u32(8).u64(1 << 29).bytes(b"short").0),
        ("gguf-big-endian.gguf", b"GGUF\0\0\0\x03\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec()),
        ("gguf-unsupported-version.0.gguf", Gguf::new(0, 0, 0).0),
        ("gguf-unsupported-version.1.gguf", Gguf::new(1, 0, 0).0),
        ("gguf-unsupported-version.4.gguf", Gguf::new(4, 0, 0).0),
        ("gguf-too-many.tensors.gguf", Gguf::new(3, 1 << 60, 0).0),
        ("gguf-too-many.tensors-negative.gguf", Gguf::new(3, u64::MAX, 0).0),
        ("gguf-too-many.keys.gguf", Gguf::new(3, 0, 1 << 60).0),
        ("gguf-too-many.elements.gguf", key("list").u32(9).u32(4).u64(1 << 60).bytes(&[0; 64]).0),
        ("gguf-too-many.elements-wrap.gguf", key("list").u32(9).u32(4).u64(1 << 62).bytes(&[0; 64]).0),
        ("gguf-too-many.strings.gguf", key("list").u32(9).u32(8).u64(1 << 60).bytes(&[0; 64]).0),
        ("gguf-too-long.key.gguf", Gguf::new(3, 0, 1).u64(1 << 60).bytes(&[b'k'; 32]).0),
        ("gguf-too-long.string.gguf", key("key").u32(8).u64(1 << 60).bytes(b"short").0),
        ("gguf-too-long.tensor-name.gguf", tensor(&"n".repeat(64), &[1], 0, 0)),
        ("gguf-not-utf8.key.gguf", Gguf::new(3, 0, 1).u64(2).bytes(&[0xff, 0xfe]).u32(4).u32(0).0),
        ("gguf-not-utf8.string.gguf", key("key").u32(8).u64(2).bytes(&[0xc3, 0x28]).0),
        ("gguf-empty-key.gguf", key("").u32(4).u32(0).bytes(&[0; 8]).0),
        ("gguf-duplicate-key.gguf", Gguf::new(3, 0, 2).key_u32("a", 1).key_u32("a", 1).0),
        ("gguf-unknown-value-type.gguf", key("key").u32(13).u64(0).0),
        ("gguf-unknown-value-type.element.gguf", key("key").u32(9).u32(13).u64(0).0),
        ("gguf-nested-array.gguf", key("key").u32(9).u32(9).u64(1).u32(4).u64(0).0),
        ("gguf-bad-alignment.0.gguf", alignment(0)),
        ("gguf-bad-alignment.24.gguf", alignment(24)),
        ("gguf-bad-alignment.2-gib.gguf", alignment(1 << 31)),
        ("gguf-wrong-value-type.alignment.gguf", key("general.alignment").u32(10).u64(32).0),
        ("gguf-wrong-value-type.split.gguf", key("split.count").u32(8).string("2").0),
        ("gguf-value-out-of-range.gguf", key("split.count").u32(3).bytes(&[0xff, 0xff]).0),
        ("gguf-split-file.gguf", key("split.count").u32(2).bytes(&[3, 0]).0),
        ("gguf-empty-tensor-name.gguf", tensor("", &[1], 0, 0)),
        ("gguf-duplicate-tensor.gguf", two("a", 32)),
        ("gguf-too-many-dims.gguf", tensor("a", &[1; 5], 0, 0)),
        ("gguf-negative-dim.gguf", tensor("a", &[2, 1 << 63], 0, 0)),
        ("gguf-unknown-tensor-type.removed.gguf", tensor("a", &[32], 4, 0)),
        ("gguf-unknown-tensor-type.future.gguf", tensor("a", &[32], 43, 0)),
        ("gguf-unknown-tensor-type.negative.gguf", tensor("a", &[32], u32::MAX, 0)),
        ("gguf-partial-block.gguf", tensor("a", &[33], 2, 0)),
        ("gguf-size-overflow.elements.gguf", tensor("a", &[i64::MAX as u64, 2], 0, 0)),
        ("gguf-size-overflow.zero.gguf", tensor("a", &[0, i64::MAX as u64, 2], 0, 0)),
        ("gguf-size-overflow.bytes.gguf", tensor("a", &[1 << 61], 0, 0)),
        (
            "gguf-size-overflow.running-sum.gguf",
            // Two tensors whose sizes fit 63 bits each, but not 64 bits together with a third.
            Gguf::new(3, 3, 0)
                .tensor("a", &[(1 << 61) - 1], 0, 0)
                .tensor("b", &[(1 << 61) - 1], 0, 1 << 63)
                .tensor("c", &[(1 << 61) - 1], 0, 0)
                .0,
        ),
        ("gguf-wrong-offset.gap.gguf", two("b", 64)),
        ("gguf-wrong-offset.overlap.gguf", two("b", 0)),
        ("gguf-wrong-offset.unaligned.gguf", two("b", 8)),
        ("gguf-past-end.gguf", tensor("a", &[17], 0, 0)),
        ("gguf-past-end.no-data.gguf", Gguf::new(3, 1, 0).tensor("a", &[1], 0, 0).0),
        ("gguf-past-end.1-tib.gguf", tensor("a", &[1 << 38], 0, 0)),
    ]
}

/// What is left of the list of llama.cpp's `test-gguf`, with its numbers.
fn gguf_of_llama_cpp() -> Vec<Case> {
    let tensor = |shape: &[u64], ty, offset| Gguf::new(3, 1, 0).tensor("a", shape, ty, offset).data(32, 64).0;
    let alignment = |ty, value| Gguf::new(3, 0, 1).string("general.alignment").u32(ty).u32(value).0;
    let big = 4 * i32::MAX as u64;
    // 1 % more than the root of the number of I64 that 2^64 bytes hold.
    let wide = 1_533_841_408;
    let near = 0x7fff_ffff_ffff_ffc0;
    vec![
        ("gguf-not-gguf.fugg.gguf", [&b"FUGG"[..], &Gguf::new(3, 0, 0).0[4..]].concat()),
        ("gguf-too-many.keys-negative.gguf", Gguf::new(3, 0, u64::MAX).0),
        ("gguf-too-long.key-negative.gguf", Gguf::new(3, 0, 1).u64(u64::MAX).bytes(b"my_key_0").0),
        ("gguf-bad-alignment.13.gguf", alignment(4, 13)),
        ("gguf-wrong-value-type.alignment-i32.gguf", alignment(5, 32)),
        ("gguf-negative-dim.first.gguf", tensor(&[u64::MAX], 0, 0)),
        ("gguf-size-overflow.elements-squared.gguf", tensor(&[big, big], 0, 0)),
        ("gguf-size-overflow.bytes-i64.gguf", tensor(&[wide, wide], 27, 0)),
        // 2^64 - 16 bytes, which padding to 32 would wrap to 0.
        ("gguf-size-overflow.padding.gguf", tensor(&[4, (1 << 30) - 1, (1 << 30) + 1], 0, 0)),
        ("gguf-wrong-offset.negative.gguf", tensor(&[2], 0, u64::MAX)),
        (
            "gguf-past-end.two-halves.gguf",
            Gguf::new(3, 2, 0).tensor("a", &[near], 24, 0).tensor("b", &[near], 24, near).data(32, 32).0,
        ),
        (
            "gguf-past-end.last-byte.gguf",
            Gguf::new(3, 2, 0).tensor("a", &[2], 0, 0).tensor("b", &[2], 0, 32).data(32, 39).0,
        ),
        // A name that would clear the screen and ring, and go on for long.
        (
            "gguf-truncated.screen.gguf",
            Gguf::new(3, 1, 0).string(&format!("\u{1b}[2J\u{7}{}", "x".repeat(50))).0,
        ),
    ]
}

/// Files of split models: the second of two serves the first and is not opened by itself.
fn split() -> Vec<Case> {
    let part = |no: Option<u16>, count: u16, tensors: i32, name: &str| {
        let mut file = Gguf::new(3, 1, 2 + u64::from(no.is_some()));
        if let Some(no) = no {
            file = file.string("split.no").u32(2).bytes(&no.to_le_bytes());
        }
        file = file.string("split.count").u32(2).bytes(&count.to_le_bytes());
        file = file.string("split.tensors.count").u32(5).bytes(&tensors.to_le_bytes());
        file.tensor(name, &[2], 0, 0).data(32, 32).0
    };
    let first = part(Some(0), 2, 2, "a");
    vec![
        ("gguf-split-file.second-00002-of-00003.gguf", part(Some(1), 3, 3, "b")),
        ("gguf-split-file.no-00001-of-00003.gguf", part(Some(2), 3, 3, "c")),
        ("gguf-missing-shard.second-00001-of-00002.gguf", first.clone()),
        ("gguf-wrong-part.no-00001-of-00002.gguf", first.clone()),
        ("gguf-wrong-part.no-00002-of-00002.gguf", part(Some(0), 2, 2, "b")),
        ("gguf-wrong-part.count-00001-of-00002.gguf", first.clone()),
        ("gguf-wrong-part.count-00002-of-00002.gguf", part(Some(1), 3, 2, "b")),
        ("gguf-wrong-part.tensors-00001-of-00002.gguf", first.clone()),
        ("gguf-wrong-part.tensors-00002-of-00002.gguf", part(Some(1), 2, 3, "b")),
        ("gguf-missing-key.no-00001-of-00002.gguf", first.clone()),
        ("gguf-missing-key.no-00002-of-00002.gguf", part(None, 2, 2, "b")),
        ("gguf-wrong-tensor-count.many-00001-of-00002.gguf", part(Some(0), 2, 3, "a")),
        ("gguf-wrong-tensor-count.many-00002-of-00002.gguf", part(Some(1), 2, 3, "b")),
        ("gguf-tensor-in-two-shards.a-00001-of-00002.gguf", first),
        ("gguf-tensor-in-two-shards.a-00002-of-00002.gguf", part(Some(1), 2, 2, "a")),
    ]
}

fn st() -> Vec<Case> {
    let tensor = |info: &str, len| safetensors(&format!(r#"{{"a":{{{info}}}}}"#), len);
    let one = |dtype, shape: &str, begin, end, len| {
        tensor(&format!(r#""dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]"#), len)
    };
    let two = |a: &str, b: &str, begin: u32| {
        let info = |begin| format!(r#"{{"dtype":"U8","shape":[2],"data_offsets":[{begin},{}]}}"#, begin + 2);
        safetensors(&format!(r#"{{"{a}":{},"{b}":{}}}"#, info(0), info(begin)), 4)
    };
    vec![
        ("safetensors-truncated.empty.safetensors", Vec::new()),
        ("safetensors-truncated.length.safetensors", vec![1, 0, 0]),
        ("safetensors-truncated.header.safetensors", safetensors("{}", 0)[..9].to_vec()),
        ("safetensors-too-long.safetensors", [&(1_u64 << 60).to_le_bytes()[..], b"{}"].concat()),
        ("safetensors-not-utf8.safetensors", [&2_u64.to_le_bytes()[..], &[0xff, 0xfe]].concat()),
        ("safetensors-json.safetensors", safetensors("{\"a\":", 0)),
        ("safetensors-json.duplicate.safetensors", two("a", "a", 2)),
        ("safetensors-json.dtype.safetensors", one("F33", "[1]", 0, 4, 4)),
        ("safetensors-json.negative.safetensors", one("F32", "[-1]", 0, 4, 4)),
        ("safetensors-json.array.safetensors", safetensors("[]", 0)),
        ("safetensors-json.metadata.safetensors", safetensors(r#"{"__metadata__":{"a":1}}"#, 0)),
        ("safetensors-empty-tensor-name.safetensors", two("", "b", 2)),
        ("safetensors-wrong-offset.gap.safetensors", one("U8", "[2]", 2, 4, 4)),
        ("safetensors-wrong-offset.overlap.safetensors", two("a", "b", 1)),
        ("safetensors-wrong-length.safetensors", one("F32", "[2]", 0, 4, 4)),
        ("safetensors-wrong-length.backwards.safetensors", one("U8", "[1]", 0, 0, 0)),
        ("safetensors-size-overflow.safetensors", one("F32", "[4294967296,4294967296]", 0, 4, 4)),
        ("safetensors-partial-block.safetensors", one("F4", "[3]", 0, 1, 1)),
        ("safetensors-past-end.safetensors", one("F32", "[2]", 0, 8, 4)),
        ("safetensors-trailing-data.safetensors", one("F32", "[1]", 0, 4, 5)),
    ]
}

fn peft() -> Vec<Case> {
    let config =
        |rest: &str| format!(r#"{{"peft_type": "LORA", "r": 8, "lora_alpha": 16, {rest}}}"#).into_bytes();
    vec![
        ("peft-json.json", b"{".to_vec()),
        ("peft-json.list.json", b"[]".to_vec()),
        ("peft-json.twice.json", config(r#""r": 8"#)),
        ("peft-json.twice-inside.json", config(r#""rank_pattern": {"q_proj": 4, "q_proj": 8}"#)),
        ("peft-json.deep.json", [vec![b'['; 2000], vec![b']'; 2000]].concat()),
        ("peft-missing-key.peft-type.json", br#"{"r": 8, "lora_alpha": 16}"#.to_vec()),
        ("peft-missing-key.r.json", br#"{"peft_type": "LORA", "lora_alpha": 16}"#.to_vec()),
        ("peft-missing-key.alpha.json", br#"{"peft_type": "LORA", "r": 8}"#.to_vec()),
        ("peft-wrong-setting.r.json", br#"{"peft_type": "LORA", "r": 0, "lora_alpha": 16}"#.to_vec()),
        ("peft-wrong-setting.r-float.json", br#"{"peft_type": "LORA", "r": 8.5, "lora_alpha": 16}"#.to_vec()),
        ("peft-wrong-setting.alpha.json", br#"{"peft_type": "LORA", "r": 8, "lora_alpha": "16"}"#.to_vec()),
        ("peft-wrong-setting.dropout.json", config(r#""lora_dropout": 1.0"#)),
        ("peft-wrong-setting.use-dora.json", config(r#""use_dora": "yes""#)),
        ("peft-wrong-setting.target-modules.json", config(r#""target_modules": [1]"#)),
        ("peft-wrong-setting.init.json", config(r#""init_lora_weights": 1"#)),
        ("peft-wrong-setting.rank-pattern.json", config(r#""rank_pattern": {"q_proj": -1}"#)),
        ("peft-unsupported-setting.peft-type.json", br#"{"peft_type": "IA3"}"#.to_vec()),
        ("peft-unsupported-setting.bias.json", config(r#""bias": "lora_only""#)),
        ("peft-unsupported-setting.fan-in-fan-out.json", config(r#""fan_in_fan_out": true"#)),
        ("peft-unsupported-setting.modules-to-save.json", config(r#""modules_to_save": ["lm_head"]"#)),
        ("peft-unsupported-setting.lora-bias.json", config(r#""lora_bias": true"#)),
        ("peft-unsupported-setting.target-parameters.json", config(r#""target_parameters": ["experts"]"#)),
    ]
}

fn imatrix() -> Vec<Case> {
    let keys = |kind: &str| {
        Gguf::new(3, 2, 4)
            .string("general.type")
            .u32(8)
            .string(kind)
            .key_u32("imatrix.chunk_count", 1)
            .key_u32("imatrix.chunk_size", 512)
            .string("imatrix.datasets")
            .u32(9)
            .u32(8)
            .u64(0)
    };
    let pair = |values: &[f32], count: f32| {
        let mut file = keys("imatrix")
            .tensor("a.in_sum2", &[values.len() as u64], 0, 0)
            .tensor("a.counts", &[1], 0, 32)
            .data(32, 0);
        file = values.iter().fold(file, |file, x| file.bytes(&x.to_le_bytes()));
        file.bytes(&vec![0; 32 - 4 * values.len()]).bytes(&count.to_le_bytes()).0
    };
    let legacy = |numbers: &[u32]| numbers.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<_>>();
    // One entry `abcd` of one value.
    let (name, one) = (u32::from_le_bytes(*b"abcd"), 1.0_f32.to_bits());
    vec![
        ("imatrix-bad-importance.nan.gguf", pair(&[1.0, f32::NAN], 1.0)),
        ("imatrix-bad-importance.negative.gguf", pair(&[-1.0], 1.0)),
        ("imatrix-bad-importance.count.gguf", pair(&[1.0], f32::INFINITY)),
        ("imatrix-bad-importance.overflow.dat", legacy(&[1, 4, name, 1, 1, f32::INFINITY.to_bits()])),
        (
            "imatrix-uneven-importance.empty.gguf",
            keys("imatrix").tensor("a.in_sum2", &[0], 0, 0).tensor("a.counts", &[1], 0, 0).data(32, 4).0,
        ),
        (
            "imatrix-uneven-importance.gguf",
            keys("imatrix")
                .tensor("a.in_sum2", &[3], 0, 0)
                .tensor("a.counts", &[2], 0, 32)
                .data(32, 0)
                .bytes(&[0; 40])
                .0,
        ),
        ("imatrix-uneven-importance.dat", legacy(&[1, 4, name, 1, 0, 0])),
        (
            "imatrix-wrong-tensor-type.gguf",
            keys("imatrix").tensor("a.in_sum2", &[2], 1, 0).tensor("a.counts", &[1], 0, 32).data(32, 36).0,
        ),
        (
            "imatrix-missing-tensor.counts.gguf",
            keys("imatrix").tensor("a.in_sum2", &[1], 0, 0).tensor("b", &[1], 0, 32).data(32, 36).0,
        ),
        (
            "imatrix-missing-tensor.sums.gguf",
            keys("imatrix").tensor("a.counts", &[1], 0, 0).tensor("b", &[1], 0, 32).data(32, 36).0,
        ),
        (
            "imatrix-no-importance.gguf",
            keys("imatrix").tensor("a", &[1], 0, 0).tensor("b", &[1], 0, 32).data(32, 36).0,
        ),
        ("imatrix-no-importance.dat", legacy(&[0])),
        (
            "imatrix-not-imatrix.gguf",
            keys("model").tensor("a", &[1], 0, 0).tensor("b", &[1], 0, 32).data(32, 36).0,
        ),
        ("imatrix-missing-key.gguf", Gguf::new(3, 0, 0).0),
        ("imatrix-truncated.dat", legacy(&[1, 40, name, 1, 1, one])),
        ("imatrix-too-many.entries.dat", legacy(&[1 << 30, 4, name, 1, 1, one])),
        ("imatrix-too-many.negative.dat", legacy(&[u32::MAX, 4, name, 1, 1, one])),
        ("imatrix-too-many.values.dat", legacy(&[1, 4, name, 1, 1 << 30, one])),
        ("imatrix-too-long.dat", legacy(&[1, u32::MAX, name, 1, 1, one])),
        ("imatrix-not-utf8.dat", legacy(&[1, 4, u32::MAX, 1, 1, one])),
        ("imatrix-duplicate-tensor.dat", legacy(&[2, 4, name, 1, 1, one, 4, name, 1, 1, one])),
        ("imatrix-trailing-data.dat", legacy(&[1, 4, name, 1, 1, one, 7, 0, 0])),
    ]
}

fn cases() -> Vec<Case> {
    [gguf(), gguf_of_llama_cpp(), split(), st(), peft(), imatrix()].concat()
}

fn open(path: &Path) -> Result<()> {
    if path.file_name().unwrap().to_str().unwrap().starts_with("imatrix-") {
        return Imatrix::open(path).map(drop);
    }
    match path.extension().and_then(|e| e.to_str()) {
        Some("gguf") => GgufFile::open(path).map(drop),
        Some("safetensors") => SafetensorsFile::open(path).map(drop),
        Some("json") => PeftConfig::read(path).map(drop),
        other => panic!("no reader for {other:?}"),
    }
}

/// The variant's name as in the file names: `TooMany { .. }` is `too-many`.
pub fn variant(kind: &Kind) -> String {
    let debug = format!("{kind:?}");
    let name: String = debug.chars().take_while(char::is_ascii_alphanumeric).collect();
    let mut out = String::new();
    for (i, c) in name.chars().enumerate() {
        if c.is_ascii_uppercase() && i > 0 {
            out.push('-');
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}

#[test]
fn the_stored_files_are_those_built_here() {
    let dir = testdata("bad");
    let cases: Vec<Case> = cases();
    if std::env::var_os("BLESS").is_some() {
        fs::create_dir_all(&dir).unwrap();
        for (name, bytes) in &cases {
            fs::write(dir.join(name), bytes).unwrap();
        }
    }
    for (name, bytes) in &cases {
        assert!(bytes.len() < 4096, "{name}");
        assert!(fs::read(dir.join(name)).unwrap() == *bytes, "{name}");
    }
    let built: BTreeSet<String> = cases.iter().map(|(name, _)| (*name).to_owned()).collect();
    let stored: BTreeSet<String> = fs::read_dir(&dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|name| {
            ["gguf-", "safetensors-", "peft-", "imatrix-"].iter().any(|format| name.starts_with(format))
        })
        .collect();
    assert_eq!(stored, built);
}

#[test]
fn every_bad_file_is_refused_for_the_reason_in_its_name() {
    let mut wrong = Vec::new();
    for (name, _) in cases().into_iter().filter(|(name, _)| !name.contains("-00002-of-00002")) {
        let path = testdata("bad").join(name);
        let (_, rest) = name.split_once('-').unwrap();
        let expected = rest.split_once('.').unwrap().0;
        match open(&path) {
            Ok(()) => wrong.push(format!("{name}: accepted")),
            Err(error) => {
                let named = error.path.clone().unwrap();
                let second = path.to_str().unwrap().replace("-00001-of", "-00002-of");
                assert!(named == path || named == Path::new(&second), "{name}: {}", named.display());
                let text = error.to_string();
                assert!(!text.ends_with('.') && text.contains('`'), "{text}");
                if variant(&error.kind) != expected {
                    wrong.push(format!("{name}: {text}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn messages_say_where_what_was_expected_and_what_was_found() {
    let message = |name: &str| {
        let path = testdata("bad").join(name);
        let text = open(&path).unwrap_err().to_string();
        text.strip_prefix(&format!("`{}`: ", path.display())).unwrap().to_owned()
    };
    let cases = [
        (
            "gguf-too-many.tensors.gguf",
            "header: declares 1152921504606846976 tensors, at most 0 are possible here (at byte 8)",
        ),
        (
            "gguf-unsupported-version.4.gguf",
            "header: has GGUF version 4, versions 2 and 3 are supported (at byte 4)",
        ),
        (
            "gguf-truncated.screen.gguf",
            "tensor `\\u{1b}[2J\\u{7}xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx`: number of dimensions needs",
        ),
        ("gguf-wrong-offset.gap.gguf", "tensor `b`: data lies at offset 64, expected 32"),
        ("gguf-past-end.gguf", "tensor `a`: data ends at byte 132, the file at byte 128"),
        ("gguf-partial-block.gguf", "row length 33 is not a multiple of the Q4_0 block length 32"),
        (
            "gguf-split-file.gguf",
            "key `split.count`: is file 1 of 3; a split model has files `NAME-00001-of-00003.gguf` and so on, and is opened by the first",
        ),
        (
            "gguf-missing-shard.second-00001-of-00002.gguf",
            "key `split.count`: names the shard `gguf-missing-shard.second-00002-of-00002.gguf`, which does not exist",
        ),
        (
            "gguf-wrong-tensor-count.many-00001-of-00002.gguf",
            "key `split.tensors.count`: is 3, the files of the split model hold 2 tensors",
        ),
        (
            "imatrix-bad-importance.nan.gguf",
            "tensor `a`: sum 1 is `NaN`, expected a finite number of at least 0",
        ),
        (
            "imatrix-too-many.values.dat",
            "tensor `abcd`: declares 1073741824 values, at most 1 are possible here (at byte 16)",
        ),
        ("safetensors-wrong-length.safetensors", "tensor `a`: needs 8 bytes, 4 were given"),
        (
            "peft-unsupported-setting.bias.json",
            "key `bias`: is `\"lora_only\"`, which is not supported; supported: `none`",
        ),
    ];
    for (name, expected) in cases {
        let message = message(name);
        assert!(message.contains(expected), "{message}");
    }
}
