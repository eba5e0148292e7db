//! Folders that are written: in bitsandbytes' types as transformers saves them, and merged ones against the adapter.

use std::path::{Path, PathBuf};

use qpeft::adapters::AdapterFolder;
use qpeft::convert::bitsandbytes::{QuantizeReport, write_bitsandbytes_folder};
use qpeft::convert::merge_folder::{FolderTarget, merge_to_folder};
use qpeft::model::{Base, Batch, Buffers, Decoder, Keep, Parameters};
use qpeft_formats::GgmlType;
use qpeft_formats::bitsandbytes::QuantType;
use qpeft_formats::safetensors::Checkpoint;
use qpeft_formats::safetensors::folder::SHARD_BYTES;
use qpeft_kernels::Device;
use qpeft_kernels::ops::quantize::Packers;

fn testdata(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(path)
}

fn write(folder: &Checkpoint, to: &Path, shard_bytes: u64) -> qpeft::Result<QuantizeReport> {
    let packers = Packers::default();
    write_bitsandbytes_folder(folder, QuantType::Nf4, true, &packers, to, shard_bytes, |_, _| {})
}

#[test]
fn a_quantized_folder_is_the_one_that_transformers_saves() {
    let source = Checkpoint::open(&testdata("models/tiny-llama")).unwrap();
    let expected = Checkpoint::open(&testdata("models/tiny-llama-nf4")).unwrap();
    let out = tempfile::tempdir().unwrap();
    for (shard_bytes, name) in [(SHARD_BYTES, "one"), (100_000, "many")] {
        let path = out.path().join(name);
        let write = || write(&source, &path, shard_bytes).unwrap();
        let report = write();
        assert_eq!((report.quantized, report.copied), (14, 6));
        let written = Checkpoint::open(&path).unwrap();
        assert!(written.names().eq(expected.names()));
        for name in expected.names() {
            let (a, b) = (written.require(name).unwrap(), expected.require(name).unwrap());
            assert_eq!((a.dtype, &a.shape), (b.dtype, &b.shape), "{name}");
            assert!(a.bytes[..] == b.bytes[..], "{name}");
        }
        assert_eq!(written.config()["quantization_config"], expected.config()["quantization_config"]);
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            assert!(path.join(file).exists(), "{file}");
        }
        assert_eq!(path.join("model.safetensors.index.json").exists(), name == "many");
    }
    let again = Checkpoint::open(&out.path().join("one")).unwrap();
    let path = out.path().join("twice");
    let error = write(&again, &path, SHARD_BYTES);
    assert!(error.unwrap_err().to_string().contains("quantized already"));
    assert!(!path.exists());
}

fn loss(decoder: &Decoder, params: &Parameters) -> f64 {
    let tokens: Vec<u32> = (0..24).map(|i| i * 37 % 500).collect();
    let labels: Vec<i32> = tokens.iter().map(|&t| t as i32).collect();
    let mut batch = Batch::new();
    batch.push(&tokens, &labels);
    let mut buffers = Buffers::new(decoder, batch.len(), Keep::Nothing).unwrap();
    let pass = params.pass(None);
    decoder.loss(&mut buffers, &batch, &pass).unwrap().mean()
}

#[test]
fn a_merged_folder_computes_what_base_and_adapter_do() {
    let base = Base::open(&testdata("models/tiny-llama-nf4")).unwrap();
    let mut decoder = Decoder::load(&base, &Device::Cpu).unwrap();
    let folder = AdapterFolder::open(&testdata("peft/fp32/dora/trained")).unwrap();
    let params = folder.mount(&mut decoder).unwrap();
    let expected = loss(&decoder, &params);
    let out = tempfile::tempdir().unwrap();
    let merged = |target, name: &str| {
        let path = out.path().join(name);
        let report =
            merge_to_folder(&base, &decoder, &params, target, &Device::Cpu, &path, SHARD_BYTES, |_, _| {})
                .unwrap();
        let base = Base::open(&path).unwrap();
        let merged = Decoder::load(&base, &Device::Cpu).unwrap();
        (report, loss(&merged, &Parameters::none(&Device::Cpu).unwrap()), base.main_type())
    };
    let (report, found, _) = merged(FolderTarget::Dense(None), "dense");
    assert_eq!(report.merged, decoder.linears().filter(|l| l.adapter.is_some()).count());
    assert!((found - expected).abs() < 1e-5 * expected, "{found} for {expected}");
    assert!(report.loss.noise == 0.0 && report.loss.change > 0.0);
    let (report, found, _) = merged(FolderTarget::Dense(Some(GgmlType::BF16)), "bf16");
    // Eight bits of mantissa move a weight by 2^-9 of itself at most.
    assert!(report.relative_noise() < 0.002, "{}", report.relative_noise());
    assert!((found - expected).abs() < 0.02 * expected, "{found} for {expected}");
    let target = FolderTarget::FourBit { quant_type: QuantType::Nf4, double: None };
    let (report, _, main_type) = merged(target, "nf4");
    // The error of NF4 on weights like these is 7 to 9 % of their norm.
    assert!((0.03..0.12).contains(&report.relative_noise()), "{}", report.relative_noise());
    assert_eq!(main_type, "nf4-dq");
}

#[test]
fn an_adapter_notices_how_its_base_was_quantized_at_load() {
    let model = testdata("models/tiny-llama");
    let open = |quant: Option<&str>| Base::open_as(&model, quant.map(|q| q.parse().unwrap())).unwrap();
    let prints: Vec<String> = [None, Some("nf4"), Some("nf4-dq"), Some("q8_0")]
        .map(|quant| open(quant).fingerprint().unwrap())
        .to_vec();
    assert_eq!(prints[2], format!("{}+nf4-dq", prints[0]));
    assert_ne!(prints[1], prints[3]);
    let refused = Base::open_as(&testdata("models/tiny-llama-nf4"), Some("nf4".parse().unwrap()));
    assert!(refused.unwrap_err().to_string().contains("is quantized already (nf4-dq)"));
}
