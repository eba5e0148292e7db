//! A trained PiSSA adapter as a plain LoRA of the original base.
//!
//! The residual is `W_res = W - s B0 A0`, so `W_res + s B A = W + s (B A - B0 A0)`: a pair of twice the
//! rank, `[B, -B0]` and `[A; A0]`, on W itself. Exact if the residual was stored exactly; on a quantized
//! base the model trained on `Q(W_res)`, and the difference `Q(W_res) - W_res` stays behind. A trained
//! magnitude (PiSSA + DoRA) belongs to the sum and is kept: the result is then a DoRA adapter.

use qpeft_formats::peft::{HostTensor, InitLoraWeights, PeftAdapter, PeftConfig};

use crate::error::{Error, Result};

/// The LoRA (or DoRA) of the original base that equals `trained` on its residual.
///
/// A' = \[A; A0\] (2r, in), B' = \[B, -B0\] (out, 2r), scaling unchanged: r and alpha double, alpha of an
/// rsLoRA grows by sqrt(2). Precision: exact copies. Source: PEFT's conversion of mutated inits, without
/// its losses (it drops every tensor but A and B).
///
/// # Errors
/// The two adapters do not have the same matrices.
pub fn pissa_to_lora(trained: &PeftAdapter, initial: &PeftAdapter) -> Result<PeftAdapter> {
    let mut wrong = Vec::new();
    let mut converted = PeftAdapter { config: doubled(&trained.config), tensors: trained.tensors.clone() };
    for (key, tensor) in &mut converted.tensors {
        let stack: fn(&HostTensor, &HostTensor) -> HostTensor = match key.as_str() {
            key if key.ends_with(".lora_A.weight") => below,
            key if key.ends_with(".lora_B.weight") => beside_negated,
            _ => continue,
        };
        match initial.tensors.get(key) {
            None => wrong.push(format!("`{key}` is missing")),
            Some(start) if start.shape != tensor.shape => {
                wrong
                    .push(format!("`{key}` has shape {:?}, the trained one {:?}", start.shape, tensor.shape));
            }
            Some(start) => *tensor = stack(tensor, start),
        }
    }
    if wrong.is_empty() {
        return Ok(converted);
    }
    Err(Error::refused(format!(
        "the initial adapter does not belong to the trained one:\n  {}",
        wrong.join("\n  ")
    ))
    .with_hint("the initial adapter is in the `init` folder of the same run"))
}

/// The configuration of twice the rank at the same scaling.
fn doubled(config: &PeftConfig) -> PeftConfig {
    let mut config = config.clone();
    // scaling = alpha / r, or alpha / sqrt(r)
    let growth = if config.use_rslora { std::f64::consts::SQRT_2 } else { 2.0 };
    config.r *= 2;
    config.lora_alpha *= growth;
    config.rank_pattern.values_mut().for_each(|r| *r *= 2);
    config.alpha_pattern.values_mut().for_each(|alpha| *alpha *= growth);
    // A pattern for only one of the two would meet the other's doubled default, which is right for both.
    config.init_lora_weights = InitLoraWeights::Bool(true);
    config
}

/// \[a; b\]
fn below(a: &HostTensor, b: &HostTensor) -> HostTensor {
    let data = a.data.iter().chain(&b.data).copied().collect();
    HostTensor { shape: vec![a.shape[0] + b.shape[0], a.shape[1]], data }
}

/// \[a, -b\]
fn beside_negated(a: &HostTensor, b: &HostTensor) -> HostTensor {
    let rank = a.shape[1];
    let rows = a.data.chunks_exact(rank).zip(b.data.chunks_exact(rank));
    let data = rows.flat_map(|(a, b)| a.iter().copied().chain(b.iter().map(|x| -x))).collect();
    HostTensor { shape: vec![a.shape[0], 2 * rank], data }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(a: &[f32], b: &[f32]) -> PeftAdapter {
        let mut config = PeftConfig::new(1, 3.0);
        config.init_lora_weights = InitLoraWeights::Named("pissa".to_owned());
        let tensors = [
            ("m.lora_A.weight".to_owned(), HostTensor { shape: vec![1, a.len()], data: a.to_vec() }),
            ("m.lora_B.weight".to_owned(), HostTensor { shape: vec![b.len(), 1], data: b.to_vec() }),
            ("m.lora_magnitude_vector".to_owned(), HostTensor { shape: vec![1], data: vec![7.0] }),
        ];
        PeftAdapter { config, tensors: tensors.into() }
    }

    #[test]
    fn the_pair_of_twice_the_rank_is_the_difference_of_the_products() {
        let (trained, initial) = (pair(&[1.0, 2.0], &[3.0, 4.0]), pair(&[5.0, 6.0], &[7.0, 8.0]));
        let lora = pissa_to_lora(&trained, &initial).unwrap();
        assert_eq!((lora.config.r, lora.config.lora_alpha), (2, 6.0));
        assert_eq!(lora.config.init_lora_weights, InitLoraWeights::Bool(true));
        let (a, b) = (&lora.tensors["m.lora_A.weight"], &lora.tensors["m.lora_B.weight"]);
        assert_eq!((&a.shape[..], &b.shape[..]), (&[2, 2][..], &[2, 2][..]));
        let product =
            |row: usize, col: usize| (0..2).map(|k| b.data[row * 2 + k] * a.data[k * 2 + col]).sum::<f32>();
        assert_eq!(product(1, 0), 4.0 * 1.0 - 8.0 * 5.0);
        assert_eq!(lora.tensors["m.lora_magnitude_vector"].data, [7.0]);
    }

    #[test]
    fn rslora_keeps_its_scaling() {
        let (mut trained, initial) = (pair(&[1.0], &[1.0]), pair(&[1.0], &[1.0]));
        trained.config.use_rslora = true;
        let lora = pissa_to_lora(&trained, &initial).unwrap();
        let (before, after) = (trained.config.scaling("m").unwrap(), lora.config.scaling("m").unwrap());
        assert!((before - after).abs() < 1e-12, "{before} became {after}");
    }

    #[test]
    fn an_initial_adapter_of_other_shapes_is_refused_with_the_key() {
        let error = pissa_to_lora(&pair(&[1.0, 2.0], &[3.0]), &pair(&[1.0], &[3.0])).unwrap_err().to_string();
        assert!(error.contains("`m.lora_A.weight` has shape [1, 1], the trained one [1, 2]"), "{error}");
    }
}
