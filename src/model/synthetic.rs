//! Decoders in the shapes of known models with random weights: what benchmarks run on, without a download.

use std::collections::HashMap;

use qpeft_formats::GgmlType;
use qpeft_formats::safetensors::Dtype;
use qpeft_kernels::ops::quantize::Packers;
use qpeft_kernels::ops::rope::{RopeScaling, rope_table};
use qpeft_kernels::rng::RngKey;
use qpeft_kernels::weight::WeightType;
use qpeft_kernels::{Device, Tensor};
use rayon::prelude::*;

use super::config::Config;
use super::decoder::Decoder;
use super::layer::{Layer, SLOTS, Slot};
use super::linear::{BaseWeight, Linear};
use super::load::module_path;
use crate::error::{Error, Result};

/// A known model's sizes: name, V, C, F, L, H, G, D, whether the head is the embedding table.
type Row = (&'static str, [usize; 7], bool);

/// The shapes by name, largest first.
const SHAPES: [Row; 5] = [
    ("llama-3.1-8b", [128_256, 4096, 14_336, 32, 32, 8, 128], false),
    ("llama-3.2-3b", [128_256, 3072, 8192, 28, 24, 8, 128], true),
    ("llama-3.2-1b", [128_256, 2048, 8192, 16, 32, 8, 64], true),
    ("smollm2-360m", [49_152, 960, 2560, 32, 15, 5, 64], true),
    ("smollm2-135m", [49_152, 576, 1536, 30, 9, 3, 64], true),
];

/// Positions of a synthetic model.
const MAX_POSITIONS: usize = 16_384;

/// A decoder's shape.
#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    /// `llama-3.1-8b`.
    pub name: &'static str,
    /// The sizes.
    pub config: Config,
    /// Whether the output head is the embedding table.
    pub tied: bool,
}

impl Shape {
    /// The names of all shapes.
    pub fn names() -> impl Iterator<Item = &'static str> {
        SHAPES.iter().map(|(name, ..)| *name)
    }
}

impl std::str::FromStr for Shape {
    type Err = Error;

    fn from_str(name: &str) -> Result<Shape> {
        let Some(&(
            name,
            [vocab_size, hidden_size, intermediate_size, n_layers, n_heads, n_kv_heads, head_dim],
            tied,
        )) = SHAPES.iter().find(|(known, ..)| known.eq_ignore_ascii_case(name))
        else {
            let known: Vec<&str> = Shape::names().collect();
            return Err(Error::refused(format!("no shape `{name}`; the shapes are {}", known.join(", "))));
        };
        let config = Config {
            vocab_size,
            hidden_size,
            intermediate_size,
            n_layers,
            n_heads,
            n_kv_heads,
            head_dim,
            rms_norm_eps: 1e-5,
            rope_theta: 500_000.0,
            rope_scaling: RopeScaling::None,
            max_positions: MAX_POSITIONS,
        };
        Ok(Shape { name, config, tied })
    }
}

/// The types of a synthetic base's matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BaseType {
    /// All linears of one type; embedding and head in bf16, or in the type where it is one of ggml's.
    Uniform(WeightType),
    /// llama.cpp's Q4_K_M: Q4_K, with Q6_K for the head and for v and down in half of the layers.
    Q4KM,
}

impl std::str::FromStr for BaseType {
    type Err = String;

    fn from_str(name: &str) -> Result<BaseType, String> {
        if name.eq_ignore_ascii_case("q4_k_m") {
            return Ok(BaseType::Q4KM);
        }
        name.parse().map(BaseType::Uniform).map_err(|e| format!("{e}; or q4_k_m"))
    }
}

impl std::fmt::Display for BaseType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            BaseType::Uniform(of) => f.write_str(of.name()),
            BaseType::Q4KM => f.write_str("Q4_K_M"),
        }
    }
}

impl BaseType {
    fn linear(self, layer: usize, layers: usize, slot: Slot) -> WeightType {
        match self {
            BaseType::Uniform(of) => of,
            BaseType::Q4KM => {
                let eighth = layers / 8;
                let more = layer < eighth || layer >= 7 * eighth || (layer - eighth) % 3 == 2;
                let wide = more && matches!(slot, Slot::V | Slot::Down);
                WeightType::Ggml(if wide { GgmlType::Q6_K } else { GgmlType::Q4_K })
            }
        }
    }

    fn embedding(self) -> WeightType {
        match self {
            BaseType::Uniform(WeightType::Ggml(dtype)) => WeightType::Ggml(dtype),
            BaseType::Uniform(_) => WeightType::Ggml(GgmlType::BF16),
            BaseType::Q4KM => WeightType::Ggml(GgmlType::Q4_K),
        }
    }

    fn head(self) -> WeightType {
        match self {
            BaseType::Q4KM => WeightType::Ggml(GgmlType::Q6_K),
            BaseType::Uniform(_) => self.embedding(),
        }
    }
}

/// Random weights, one matrix per shape and type: the layers share the bytes in host memory.
struct Weights<'a> {
    device: &'a Device,
    made: HashMap<(WeightType, usize, usize), BaseWeight>,
}

impl Weights<'_> {
    fn get(&mut self, of: WeightType, rows: usize, cols: usize) -> Result<BaseWeight> {
        if let Some(weight) = self.made.get(&(of, rows, cols)) {
            return Ok(weight.clone());
        }
        if self.device.is_meta() {
            return Ok(BaseWeight::empty(of, rows, cols)?);
        }
        let weight = random_weight(of, rows, cols)?;
        self.made.insert((of, rows, cols), weight.clone());
        Ok(weight)
    }
}

/// A weight of normal numbers; the same one for the same type and shape.
///
/// # Errors
/// The type cannot be written or does not divide the rows.
pub fn random_weight(of: WeightType, rows: usize, cols: usize) -> Result<BaseWeight> {
    // Rows of a unit input give outputs of about its size.
    let std = 1.0 / (cols as f32).sqrt();
    let mut values = vec![0.0; rows * cols];
    values.par_chunks_mut(cols).enumerate().for_each(|(row, values)| {
        RngKey { seed: cols as u64, stream: row as u64 }.fill_normal(values, std);
    });
    let dense = BaseWeight::from_f32(rows, cols, &values)?;
    drop(values);
    Ok(dense.quantized_by(&Packers::default(), of, Dtype::BF16)?)
}

impl Decoder {
    /// A decoder of this shape with random weights.
    ///
    /// # Errors
    /// The type cannot be written or does not divide the rows, or the device is out of memory.
    pub fn synthetic(
        shape: &Shape,
        base: BaseType,
        device: &Device,
        embedding_on_host: bool,
    ) -> Result<Decoder> {
        let c = &shape.config;
        let mut weights = Weights { device, made: HashMap::new() };
        let ones = || Tensor::from_slice(device, 1, c.hidden_size, &vec![1.0; c.hidden_size]);
        let mut layers = Vec::new();
        for layer in 0..c.n_layers {
            let linear = |slot: Slot| -> Result<Linear> {
                let (rows, cols) = slot.shape(c);
                let weight = weights.get(base.linear(layer, c.n_layers, slot), rows, cols)?;
                Ok(Linear {
                    module: module_path(layer, slot),
                    weight: weight.to_device(device)?,
                    adapter: None,
                })
            };
            let linears: Vec<Linear> = Slot::ALL.into_iter().map(linear).collect::<Result<_>>()?;
            let linears = <[Linear; SLOTS]>::try_from(linears).expect("one linear per slot");
            layers.push(Layer { attn_norm: ones()?, ffn_norm: ones()?, linears, joined: false });
        }
        let embedding = weights.get(base.embedding(), c.vocab_size, c.hidden_size)?;
        let head = if shape.tied {
            None
        } else {
            Some(weights.get(base.head(), c.vocab_size, c.hidden_size)?.to_device(device)?)
        };
        Ok(Decoder {
            layers,
            final_norm: ones()?,
            rope: rope_table(device, c.max_positions, c.head_dim, c.rope_theta, &c.rope_scaling)?,
            device: device.clone(),
            embedding: if embedding_on_host {
                embedding.to_pinned(device)?
            } else {
                embedding.to_device(device)?
            },
            head,
            config: c.clone(),
            replays: super::replay::Replays::default(),
        })
    }
}
