//! The keys of an adapter's tensors: `base_model.model.<module>.<part>`.

const PREFIX: &str = "base_model.model.";

/// What the tensors of a module are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// The factor A, `[r, in]`.
    A,
    /// The factor B, `[out, r]`.
    B,
    /// DoRA's magnitude of every output row, `[out]`.
    Magnitude,
}

impl Part {
    /// All parts.
    pub const ALL: [Part; 3] = [Part::A, Part::B, Part::Magnitude];

    /// The end of the key, after the module. PEFT strips `.weight` from the magnitude and from no other.
    pub const fn suffix(self) -> &'static str {
        match self {
            Part::A => ".lora_A.weight",
            Part::B => ".lora_B.weight",
            Part::Magnitude => ".lora_magnitude_vector",
        }
    }
}

/// The key of a module's tensor: `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`.
pub fn tensor_key(module: &str, part: Part) -> String {
    format!("{PREFIX}{module}{}", part.suffix())
}

/// Module and part of a key; `None` for a key of another method.
pub fn parse_key(key: &str) -> Option<(&str, Part)> {
    let rest = key.strip_prefix(PREFIX)?;
    let (module, part) =
        Part::ALL.iter().find_map(|&part| rest.strip_suffix(part.suffix()).map(|module| (module, part)))?;
    (!module.is_empty()).then_some((module, part))
}
