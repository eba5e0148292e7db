//! From an opened base to a decoder: every weight fetched by name, nothing converted.

use qpeft_kernels::Device;
use qpeft_kernels::ops::attention::check_head_dim;
use qpeft_kernels::ops::rope::rope_table;

use super::base::{Base, Quantizing};
use super::config::Config;
use super::decoder::Decoder;
use super::layer::{Layer, SLOTS, Slot};
use super::linear::Linear;
use super::replay::Replays;
use crate::error::{Error, Result};

/// Path of a linear's module: `model.layers.0.self_attn.q_proj`.
pub fn module_path(layer: usize, slot: Slot) -> String {
    format!("model.layers.{layer}.{}", slot.module())
}

impl Decoder {
    /// The frozen decoder of a base; packed weights stay mapped.
    ///
    /// # Errors
    /// A tensor is missing, has another shape, or a type that is not supported.
    pub fn load(base: &Base, device: &Device) -> Result<Decoder> {
        Decoder::load_placed(base, device, false)
    }

    /// As [`Decoder::load`], with the embedding table in pinned host memory if asked for.
    ///
    /// # Errors
    /// See [`Decoder::load`].
    pub fn load_placed(base: &Base, device: &Device, embedding_on_host: bool) -> Result<Decoder> {
        Decoder::load_quantizing(base, device, embedding_on_host, &Quantizing::of(base, device)?)
    }

    /// As [`Decoder::load_placed`], with other means than those of the device, if the base is quantized as it is loaded.
    ///
    /// # Errors
    /// See [`Decoder::load`].
    pub fn load_quantizing(
        base: &Base,
        device: &Device,
        embedding_on_host: bool,
        quantizing: &Quantizing,
    ) -> Result<Decoder> {
        let config = base.config()?;
        check_head_dim(device, config.head_dim)?;
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embedding = base.matrix("model.embed_tokens.weight", vocab, hidden, None, quantizing)?;
        let embedding =
            if embedding_on_host { embedding.to_pinned(device)? } else { embedding.to_device(device)? };
        let head = base
            .has("lm_head.weight")
            .then(|| {
                let head = base.matrix("lm_head.weight", vocab, hidden, None, quantizing)?;
                Ok::<_, Error>(head.to_device(device)?)
            })
            .transpose()?;
        Ok(Decoder {
            layers: (0..config.n_layers)
                .map(|l| load_layer(base, device, &config, l, quantizing))
                .collect::<Result<_>>()?,
            final_norm: base.vector(device, "model.norm.weight", config.hidden_size)?,
            rope: rope_table(
                device,
                config.max_positions,
                config.head_dim,
                config.rope_theta,
                &config.rope_scaling,
            )?,
            device: device.clone(),
            embedding,
            head,
            config,
            replays: Replays::default(),
        })
    }
}

fn load_layer(
    base: &Base,
    device: &Device,
    config: &Config,
    layer: usize,
    quantizing: &Quantizing,
) -> Result<Layer> {
    let norm =
        |name: &str| base.vector(device, &format!("model.layers.{layer}.{name}.weight"), config.hidden_size);
    let linear = |slot: Slot| -> Result<Linear> {
        let module = module_path(layer, slot);
        let (rows, cols) = slot.shape(config);
        let heads = slot.permuted_heads(config);
        let weight = base.matrix(&format!("{module}.weight"), rows, cols, heads, quantizing)?;
        Ok(Linear { module, weight: weight.to_device(device)?, adapter: None })
    };
    let linears: Vec<Linear> = Slot::ALL.into_iter().map(linear).collect::<Result<_>>()?;
    Ok(Layer {
        attn_norm: norm("input_layernorm")?,
        ffn_norm: norm("post_attention_layernorm")?,
        linears: <[Linear; SLOTS]>::try_from(linears).expect("one linear per slot"),
        joined: false,
    })
}
