//! The same goldens on a GPU, where activations are bf16: the loss, every gradient and ten steps against PEFT's
//! f32; equal bits of equal runs, whatever is computed again or kept dequantized; the memory that was
//! predicted; and merges. Without a GPU these tests print why and pass.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use qpeft::adapters;
use qpeft::convert::merge::{MergeOptions, merge_to_gguf};
use qpeft::convert::merge_folder::{FolderTarget, merge_to_folder};
use qpeft::convert::merge_source::merge_folder_to_gguf;
use qpeft::model::memory::{DryRun, Settings, meta};
use qpeft::model::synthetic::Shape;
use qpeft_formats::GgmlType;
use qpeft_formats::bitsandbytes::QuantType;
use qpeft_formats::mixture::{FileType, Mixture};
use qpeft_formats::peft::{PeftConfig, TargetModules};
use qpeft_kernels::cuda::gemm::WORKSPACE;

use super::*;

/// A bf16 number is off by at most 2^-8 of itself, 1.1e-3 in the root mean square. From the embedding to the
/// gradient of the lowest layer some thirty activations and gradients are rounded one after another, and the
/// softmax and the norms pass on differences that are smaller than what they are made of: 3e-2 of a gradient
/// leaves a factor of five.
const GRADIENT: f64 = 3e-2;

/// The loss is a mean over tokens of numbers with independent errors.
const LOSS: f64 = 2e-3;

/// One test at a time: while one records a graph, the driver refuses others to open devices and streams.
static TURN: Mutex<()> = Mutex::new(());

/// The GPU for as long as the guard lives. `None`, with the reason printed, where there is none that serves; one that
/// served before and does not now fails the test.
fn device() -> Option<(MutexGuard<'static, ()>, Device)> {
    static SERVED: AtomicBool = AtomicBool::new(false);
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    match Device::open("cuda") {
        Ok(device) => {
            SERVED.store(true, Ordering::Relaxed);
            Some((turn, device))
        }
        Err(e) => {
            assert!(!SERVED.load(Ordering::Relaxed), "the GPU served before, but {e}");
            println!("skipped: {e}");
            None
        }
    }
}

/// Loss and gradients several times, first launch by launch and in the end replayed from a recording: the same
/// bits every time.
fn initial(run: &mut Run, what: &str) -> (f64, Vec<f32>) {
    let device = run.decoder.device.clone();
    // One buffer, as in training: a recording holds its address.
    let mut grads = Tensor::zeros(&device, 1, run.params.count()).unwrap();
    let mut first = None;
    for _ in 0..4 {
        grads.view_mut().zero("test").unwrap();
        let loss = run.loss_and_gradients(&mut grads);
        let found = (loss, grads.read().unwrap());
        match &first {
            None => first = Some(found),
            Some(first) => assert!(*first == found, "{what}: other bits the next time"),
        }
    }
    first.unwrap()
}

#[test]
fn cuda_initial_loss_and_every_gradient_are_those_of_peft() {
    let Some((_turn, device)) = device() else { return };
    for run_of @ (base, method) in RUNS {
        let what = format!("{base} {method}");
        let mut run = Run::on(&device, run_of, Keep::EVERYTHING, false);
        let (loss, grads) = initial(&mut run, &what);
        let expected = run.golden["init_loss"].as_f64().unwrap();
        let mut worst = (0.0, String::new());
        for (key, error, size) in gradient_errors(run_of, &run, &grads) {
            // Where PEFT's gradient is zero (A at B = 0), so is ours, exactly.
            assert!(error <= GRADIENT * size, "{what}: `{key}` is off by {error:e} of {size:e}");
            if size > 0.0 && error / size > worst.0 {
                worst = (error / size, key);
            }
        }
        println!(
            "{what}: loss off by {:.1e}, gradients by at most {:.1e} ({})",
            relative(loss, expected),
            worst.0,
            worst.1
        );
        assert!(relative(loss, expected) < LOSS, "{what}: loss {loss}, PEFT's {expected}");
    }
}

#[test]
fn cuda_bits_do_not_depend_on_what_is_computed_again_or_kept() {
    let Some((_turn, device)) = device() else { return };
    for run_of in RUNS {
        let mut expected = None;
        for (keep, copies) in [
            (Keep::EVERYTHING, false),
            (Keep::LAYER_INPUTS, false),
            (Keep::Layers(1), false),
            (Keep::LayersWithoutAct(usize::MAX), false),
            (Keep::LayersWithoutAct(1), true),
            (Keep::EVERYTHING, true),
            (Keep::LAYER_INPUTS, true),
        ] {
            let what = format!("{run_of:?}, {keep:?}, copies {copies}");
            let found = initial(&mut Run::on(&device, run_of, keep, copies), &what);
            match &expected {
                None => expected = Some(found),
                Some(expected) => assert!(*expected == found, "{what}: other bits than without"),
            }
        }
    }
}

#[test]
fn cuda_bits_with_dropout_do_not_depend_on_what_is_computed_again() {
    let Some((_turn, device)) = device() else { return };
    for use_dora in [false, true] {
        let expected = with_dropout(&device, use_dora, Keep::EVERYTHING);
        assert!(expected.0.is_finite() && expected.1.iter().any(|&g| g != 0.0));
        for keep in KEEPS {
            let found = with_dropout(&device, use_dora, keep);
            assert!(found == expected, "dora {use_dora}, {keep:?}: other bits");
        }
    }
}

#[test]
fn cuda_ten_steps_give_the_losses_of_peft() {
    let Some((_turn, device)) = device() else { return };
    for run_of in RUNS {
        for (clipped, copies) in [(false, false), (true, false), (false, true)] {
            let what = format!("{run_of:?}, clipped {clipped}, copies {copies}");
            ten_steps(Run::on(&device, run_of, Keep::EVERYTHING, copies), clipped, &what, [1e-2, GRADIENT]);
        }
    }
}

#[test]
fn cuda_equal_runs_write_equal_parameters() {
    let Some((_turn, device)) = device() else { return };
    for run_of in RUNS {
        for copies in [false, true] {
            let trained = || {
                let mut run = Run::on(&device, run_of, Keep::EVERYTHING, copies);
                let mut optimizer = run.optimizer(1.0);
                let losses: Vec<f64> = (0..5).map(|_| run.step(&mut optimizer, 1e-2).0).collect();
                (losses, run.params.values.read().unwrap())
            };
            assert!(trained() == trained(), "{run_of:?}, copies {copies}: other bits in the second run");
        }
    }
}

#[test]
fn cuda_goes_on_from_a_checkpoint_bit_for_bit() {
    let Some((_turn, device)) = device() else { return };
    for run_of in RUNS {
        for copies in [false, true] {
            let mut run = Run::on(&device, run_of, Keep::EVERYTHING, copies);
            let mut optimizer = run.optimizer(1.0);
            (0..3).for_each(|_| _ = run.step(&mut optimizer, 1e-2));
            run.decoder.refresh_anew(&run.params).unwrap();
            let (values, (m, v)) = (run.params.values.read().unwrap(), optimizer.moments().unwrap());
            let mut resumed = Run::on(&device, run_of, Keep::EVERYTHING, copies);
            let mut other = resumed.optimizer(1.0);
            resumed.params.write(&values).unwrap();
            other.restore(&m, &v, 3).unwrap();
            resumed.decoder.refresh(&resumed.params).unwrap();
            let go_on = |run: &mut Run, optimizer: &mut Optimizer| {
                let losses: Vec<f64> = (0..3).map(|_| run.step(optimizer, 1e-2).0).collect();
                (losses, run.params.values.read().unwrap())
            };
            let (whole, parts) = (go_on(&mut run, &mut optimizer), go_on(&mut resumed, &mut other));
            assert!(whole == parts, "{run_of:?}, copies {copies}: other bits after a checkpoint");
        }
    }
}

/// Sequences of tokens of a large vocabulary, all supervised.
fn texts(batch: usize, length: usize) -> Batch {
    let mut texts = Batch::new();
    for i in 0..batch {
        let tokens: Vec<u32> = (0..length).map(|t| (i * 7919 + t * 104_729) as u32 % 49_000).collect();
        texts.push(&tokens, &tokens.iter().map(|&t| t as i32).collect::<Vec<_>>());
    }
    texts
}

#[test]
fn cuda_bits_do_not_depend_on_where_layer_inputs_wait() {
    let Some((_turn, device)) = device() else { return };
    let shape: Shape = "smollm2-135m".parse().unwrap();
    let (batch, length) = (2, 192);
    let texts = texts(batch, length);
    for use_dora in [false, true] {
        let mut config = PeftConfig::new(8, 16.0);
        config.target_modules = Some(TargetModules::AllLinear);
        config.use_dora = use_dora;
        let mut expected = None;
        for (keep, on_host) in [
            (Keep::EVERYTHING, false),
            (Keep::EVERYTHING, true),
            (Keep::LAYER_INPUTS, true),
            (Keep::Layers(9), true),
        ] {
            let mut decoder = Decoder::synthetic(&shape, "nf4-dq".parse().unwrap(), &device, false).unwrap();
            let params = started(&mut decoder, &config);
            let buffers = Buffers::placed(&decoder, batch * length, keep, on_host).unwrap();
            let (golden, batch) = (Value::Null, texts.clone());
            let what = format!("dora {use_dora}, {keep:?}, on host {on_host}");
            let found = initial(&mut Run { golden, batch, decoder, params, buffers }, &what);
            assert!(found.0.is_finite() && found.1.iter().any(|&g| g != 0.0));
            match &expected {
                None => expected = Some(found),
                Some(expected) => assert!(*expected == found, "{what}: other bits than on the device"),
            }
        }
    }
}

/// Apart, the ops sum in another order, and dh is rounded to bf16 after it: one in a thousand numbers is another one by
/// 2^-8. In the topmost layer that is all; the thirty layers of random weights below pass such differences on. A gradient
/// that is wrong, or missing, is off by all of it.
#[test]
fn cuda_joined_layers_have_the_gradients_of_separate_ops() {
    const TOPMOST: f64 = 1e-3;
    let Some((_turn, device)) = device() else { return };
    let shape: Shape = "smollm2-135m".parse().unwrap();
    let (batch, length) = (3, 200);
    let texts = texts(batch, length);
    for (use_dora, rank) in [(false, 8), (false, 16), (true, 8), (true, 16)] {
        let mut config = PeftConfig::new(rank, 16.0);
        config.target_modules = Some(TargetModules::AllLinear);
        config.use_dora = use_dora;
        let run = |joined: bool| {
            let mut decoder = Decoder::synthetic(&shape, "nf4-dq".parse().unwrap(), &device, false).unwrap();
            let params = started(&mut decoder, &config);
            if !joined {
                decoder.layers.iter_mut().for_each(|layer| layer.joined = false);
            }
            let is_joined = decoder.layers.iter().any(|layer| layer.joined);
            let buffers = Buffers::new(&decoder, batch * length, Keep::LayersWithoutAct(9)).unwrap();
            let (golden, batch) = (Value::Null, texts.clone());
            let mut run = Run { golden, batch, decoder, params, buffers };
            (is_joined, initial(&mut run, &format!("dora {use_dora}, joined {joined}")), run.params.entries)
        };
        let (is_joined, (loss, found), entries) = run(true);
        let (_, (expected_loss, expected), _) = run(false);
        if !is_joined {
            println!("skipped: no layer is joined on {device}");
            return;
        }
        assert_eq!(loss, expected_loss, "dora {use_dora}: the forward pass is the same");
        let (mut topmost, mut below) = (0.0f64, 0.0f64);
        for entry in &entries {
            let of = |values: &[f32], other: &[f32]| {
                let pairs = values[entry.range()].iter().zip(&other[entry.range()]);
                pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
            };
            let (error, size) = (of(&found, &expected), of(&expected, &vec![0.0; expected.len()]));
            let (limit, worst) = if entry.key.contains("layers.29.") {
                (TOPMOST, &mut topmost)
            } else {
                (GRADIENT, &mut below)
            };
            let key = &entry.key;
            assert!(error <= limit * size, "dora {use_dora}: `{key}` is off by {error:e} of {size:e}");
            *worst = worst.max(error / size);
        }
        println!("dora {use_dora}, rank {rank}: {topmost:.1e} off in the topmost layer, {below:.1e} below");
    }
}

#[test]
fn cuda_takes_the_memory_that_was_predicted() {
    let Some((_turn, _)) = device() else { return };
    let shape: Shape = "smollm2-135m".parse().unwrap();
    let tiny = Base::open(&model("nf4")).unwrap();
    for use_dora in [false, true] {
        let mut config = PeftConfig::new(16, 32.0);
        config.target_modules = Some(TargetModules::AllLinear);
        config.use_dora = use_dora;
        for synthetic in [false, true] {
            let build = |device: &Device| {
                if synthetic {
                    Decoder::synthetic(&shape, "nf4-dq".parse().unwrap(), device, false).unwrap()
                } else {
                    Decoder::load(&tiny, device).unwrap()
                }
            };
            let hyper = AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };
            let (batch, length) = (4, 256);
            let every = usize::MAX;
            for (copied, all, remakes_act) in [
                (0, false, false),
                (0, true, false),
                (every, false, false),
                (0, false, true),
                (1, false, true),
            ] {
                let what = format!(
                    "synthetic {synthetic}, dora {use_dora}, copied {copied}, recomputed {all}, act {remakes_act}"
                );
                let (counter, meter) = meta();
                let mut decoder = build(&counter);
                let before = meter.bytes();
                let params = adapters::attach(&mut decoder, &config).unwrap();
                Optimizer::new(&counter, params.count(), hyper, 1.0).unwrap();
                let adapter_bytes = meter.bytes() - before;
                let recomputed = if all { decoder.layers.len() } else { 0 };
                let decoder = &mut decoder;
                let mut dry =
                    DryRun { decoder, meter: &meter, adapter_bytes, length, recomputed: 0..=recomputed };
                let settings = Settings {
                    copied,
                    remakes_act,
                    recomputed,
                    embedding_on_host: false,
                    streams_on_host: false,
                    batch,
                };
                let predicted = dry.need(settings).unwrap().total() - WORKSPACE;

                // A device of its own counts from zero.
                let device = Device::open("cuda").unwrap();
                let mut decoder = build(&device);
                let params = adapters::attach(&mut decoder, &config).unwrap();
                let mut optimizer = Optimizer::new(&device, params.count(), hyper, 1.0).unwrap();
                decoder.keep_copies(copied).unwrap();
                let keep = settings.keep(decoder.layers.len());
                let buffers = Buffers::new(&decoder, batch * length, keep).unwrap();
                decoder.refresh(&params).unwrap();
                let mut texts = Batch::new();
                for _ in 0..batch {
                    texts.push(&vec![7; length], &vec![7; length]);
                }
                let golden = Value::Null;
                let mut run = Run { golden, batch: texts, decoder, params, buffers };
                for _ in 0..3 {
                    run.step(&mut optimizer, 1e-4);
                }
                let held = device.cuda().unwrap().held_bytes().1 - WORKSPACE;
                println!("{what}: held {held}, predicted {predicted}");
                // Partial sums of reductions are small beside anything real; here they count.
                let difference = held.abs_diff(predicted);
                assert!(
                    difference <= predicted / 20 + (1 << 20),
                    "{what}: {held} held, {predicted} predicted"
                );
            }
        }
    }
}

/// A file, or that of a folder that has the weights.
fn bytes_of(path: &Path) -> Vec<u8> {
    let weights = if path.is_dir() { path.join("model.safetensors") } else { path.to_owned() };
    std::fs::read(weights).unwrap()
}

#[test]
fn cuda_merges_as_the_cpu_does() {
    let Some((_turn, device)) = device() else { return };
    let four_bit = |quant_type, double| Some(FolderTarget::FourBit { quant_type, double: Some(double) });
    let dense = |dtype| Some(FolderTarget::Dense(Some(dtype)));
    // Of Q2_K the device has no kernel: its merge is packed by the host.
    let mixtures = [None, Some("q8_0"), Some("q4_0"), Some("q5_k_m"), Some("q4_k_m"), Some("q2_k")];
    let folders = [
        dense(GgmlType::BF16),
        dense(GgmlType::F16),
        four_bit(QuantType::Nf4, false),
        four_bit(QuantType::Nf4, true),
        four_bit(QuantType::Fp4, false),
    ];
    let cases = mixtures.map(|mixture| ("models/tiny-llama-256.Q4_K.gguf", mixture, None)).into_iter();
    let cases = cases.chain(folders.map(|target| ("models/tiny-llama", None, target)));
    let cases = cases.chain(["q8_0", "q4_0"].map(|mixture| ("models/tiny-llama", Some(mixture), None)));
    for (base, mixture, target) in cases {
        let base = Base::open(&testdata(base)).unwrap();
        for (use_dora, on_device) in [(false, false), (true, false), (true, true)] {
            let what = format!("{} as {mixture:?} {target:?}, dora {use_dora}", base.name());
            let mut config = PeftConfig::new(8, 16.0);
            config.target_modules = Some(TargetModules::AllLinear);
            config.use_dora = use_dora;
            let home = if on_device { &device } else { &Device::Cpu };
            let mut decoder = Decoder::load(&base, home).unwrap();
            let mut params = adapters::attach(&mut decoder, &config).unwrap();
            adapters::initialize(&mut decoder, &mut params, 0).unwrap();
            let mut values = params.values.read().unwrap();
            for (i, x) in values.iter_mut().enumerate() {
                // B is zero; the others move a little.
                *x = if *x == 0.0 { ((i * 7919) % 23) as f32 * 1e-3 - 0.011 } else { *x * 1.02 };
            }
            params.write(&values).unwrap();
            let dir = tempfile::tempdir().unwrap();
            let merge = |device: &Device, name: &str| {
                let path = dir.path().join(name);
                let report = if let Some(target) = target {
                    merge_to_folder(&base, &decoder, &params, target, device, &path, 1 << 30, |_, _| {})
                } else {
                    let mixture = mixture.map(|name| Mixture::new(FileType::from_name(name).unwrap()));
                    let options = MergeOptions { mixture, split: None };
                    match &base {
                        Base::Folder(folder) => {
                            let dir = folder.dir();
                            merge_folder_to_gguf(dir, &decoder, &params, &options, device, &path, |_, _| {})
                        }
                        _ => merge_to_gguf(&base, &decoder, &params, &options, device, &path, |_, _| {}),
                    }
                };
                (report.unwrap(), bytes_of(&path))
            };
            let ((expected, there), (found, here)) = (merge(&Device::Cpu, "cpu"), merge(&device, "cuda"));
            assert_eq!((found.merged, found.converted), (expected.merged, expected.converted), "{what}");
            for (found, expected) in [
                (found.arrived_share(), expected.arrived_share()),
                (found.relative_noise(), expected.relative_noise()),
                (found.loss.adapted, expected.loss.adapted),
                (found.loss.change, expected.loss.change),
            ] {
                assert!(relative(found, expected) < 1e-3, "{what}: {found}, on the CPU {expected}");
            }
            // The length of a row is summed in another order in f64; the factor that it gives has the same bits in f32.
            assert!(here == there, "{what}: other bytes");
        }
    }
}
