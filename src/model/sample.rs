//! Generation: the next token, one at a time, from a cached sequence.

use qpeft_kernels::rng::RngKey;

use super::buffers::{Buffers, Keep};
use super::decoder::{Cache, Decoder};
use super::linear::Parameters;
use crate::error::{Error, Result};

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// 0 takes the most likely token.
    pub temperature: f64,
    /// Only the most likely tokens that have this probability together are drawn from.
    pub top_p: f64,
    /// Seed of the draws.
    pub seed: u64,
}

/// Stream of the draws, apart from those of a run's initialization and dropout.
const STREAM: u64 = 2 << 40;

/// Up to `max_new_tokens` tokens that follow `prompt`, ending before the first that `stops`.
///
/// # Errors
/// The prompt is empty or does not fit the model's positions.
pub fn generate(
    decoder: &Decoder,
    params: &Parameters,
    prompt: &[u32],
    max_new_tokens: usize,
    sampling: &Sampling,
    stops: impl Fn(u32) -> bool,
) -> Result<Vec<u32>> {
    if prompt.is_empty() {
        return Err(Error::refused("the prompt has no tokens"));
    }
    let room = decoder.config.max_positions;
    if prompt.len() >= room {
        return Err(Error::refused(format!(
            "the prompt has {} tokens, the model {room} positions",
            prompt.len()
        )));
    }
    let mut buffers = Buffers::new(decoder, prompt.len(), Keep::Nothing)?;
    let mut cache = Cache::new(decoder, room.min(prompt.len() + max_new_tokens))?;
    let pass = params.pass(None);
    let key = RngKey { seed: sampling.seed, stream: STREAM };
    let mut logits = decoder.step(&mut buffers, &mut cache, prompt, &pass)?;
    let mut tokens = Vec::new();
    while tokens.len() < max_new_tokens {
        let token = choose(&logits, sampling, key.uniform(tokens.len() as u64));
        if stops(token) {
            break;
        }
        tokens.push(token);
        if tokens.len() == max_new_tokens || prompt.len() + tokens.len() >= room {
            break;
        }
        logits = decoder.step(&mut buffers, &mut cache, &[token], &pass)?;
    }
    Ok(tokens)
}

/// The token that `draw` in [0, 1) picks from the logits.
fn choose(logits: &[f32], sampling: &Sampling, draw: f32) -> u32 {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let by_logit = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if sampling.temperature == 0.0 {
        return order.into_iter().min_by(by_logit).unwrap_or(0);
    }
    order.sort_unstable_by(by_logit);
    let top = f64::from(logits[order[0] as usize]);
    let weights: Vec<f64> =
        order.iter().map(|&i| ((f64::from(logits[i as usize]) - top) / sampling.temperature).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut nucleus = 0.0;
    let mut kept = Vec::new();
    for weight in weights {
        if nucleus >= sampling.top_p * total {
            break;
        }
        nucleus += weight;
        kept.push(weight);
    }
    let mut left = f64::from(draw) * nucleus;
    for (&token, weight) in order.iter().zip(&kept) {
        left -= weight;
        if left < 0.0 {
            return token;
        }
    }
    order[kept.len().max(1) - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        let greedy = Sampling { temperature: 0.0, top_p: 1.0, seed: 0 };
        assert_eq!(choose(&[1.0, 3.0, 3.0, 2.0], &greedy, 0.9), 1);
    }

    #[test]
    fn a_draw_walks_the_probabilities_from_the_largest() {
        let logits = [0.25f32.ln(), 0.5f32.ln(), 0.25f32.ln()];
        let sampling = Sampling { temperature: 1.0, top_p: 1.0, seed: 0 };
        let picked = [0.0, 0.49, 0.51, 0.74, 0.76, 0.999].map(|draw| choose(&logits, &sampling, draw));
        assert_eq!(picked, [1, 1, 0, 0, 2, 2]);
        let nucleus = Sampling { top_p: 0.6, ..sampling };
        assert_eq!([0.0, 0.6, 0.7, 0.99].map(|draw| choose(&logits, &nucleus, draw)), [1, 1, 0, 0]);
    }
}
