//! What a model's name says: `org/SmolLM2-135M-Instruct-v0.2` is a base name, a size, a tuning and a version.
//! Source: the heuristic of gguf-py, by fact.

/// The parts of a name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ModelName {
    /// All of it, without the organization.
    pub full: String,
    /// Before the slash.
    pub organization: Option<String>,
    /// What it begins with, unless nothing else was found.
    pub basename: Option<String>,
    /// `135M`.
    pub size_label: Option<String>,
    /// `Instruct`.
    pub finetune: Option<String>,
    /// `v0.2`.
    pub version: Option<String>,
}

/// What a part between hyphens is; it can be several things.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Kind {
    version: bool,
    number_type: bool,
    size: bool,
    finetune: bool,
    base: bool,
}

impl Kind {
    fn is_known(self) -> bool {
        self != Kind::default()
    }
}

impl ModelName {
    /// Reads a name of a model with so many parameters.
    pub fn parse(id: &str, parameters: u64) -> ModelName {
        let mut name = ModelName { full: id.to_owned(), ..ModelName::default() };
        if id.contains(' ') {
            return name;
        }
        if let Some((organization, full)) = id.split_once('/') {
            name.organization = Some(organization.to_owned()).filter(|org| !org.starts_with('.'));
            full.clone_into(&mut name.full);
        }
        let mut parts: Vec<(String, Kind)> = name
            .full
            .split('-')
            .filter(|part| !part.is_empty())
            .enumerate()
            .map(|(i, part)| classify(i, part, parameters))
            .collect();
        // Sizes in words count only where there is none in numbers.
        if parts.iter().any(|(part, kind)| kind.size && part.chars().any(|c| c.is_ascii_digit())) {
            for (part, kind) in &mut parts {
                kind.size &= !part.chars().all(char::is_alphabetic);
            }
        }
        let mut at_start = true;
        for (part, kind) in &mut parts {
            let starts_a_word = !kind.is_known() && part.starts_with(char::is_alphabetic);
            if at_start && (starts_a_word || kind.version) {
                kind.base = true;
            } else {
                at_start = false;
                kind.finetune |= !kind.is_known();
            }
        }
        // A version at the end of the base name is a version.
        for (_, kind) in parts.iter_mut().rev() {
            let only_base = Kind { base: true, ..Kind::default() };
            if !kind.base || *kind == only_base {
                break;
            }
            kind.base = false;
        }
        let joined = |is: fn(&Kind) -> bool| {
            let mut chosen: Vec<&str> = Vec::new();
            for (part, kind) in &parts {
                if is(kind) {
                    chosen.push(part);
                }
            }
            Some(chosen.join("-")).filter(|text| !text.is_empty())
        };
        name.basename = joined(|kind| kind.base);
        name.size_label = joined(|kind| kind.size);
        name.finetune = joined(|kind| kind.finetune);
        name.version = joined(|kind| kind.version && !kind.base);
        if name.size_label.is_none() && name.finetune.is_none() && name.version.is_none() {
            name.basename = None;
        }
        name
    }

    /// Fills what is not known from another name.
    pub fn or(&mut self, other: ModelName) {
        fn fill(own: &mut Option<String>, other: Option<String>) {
            if own.is_none() {
                *own = other;
            }
        }
        fill(&mut self.organization, other.organization);
        fill(&mut self.basename, other.basename);
        fill(&mut self.size_label, other.size_label);
        fill(&mut self.finetune, other.finetune);
        fill(&mut self.version, other.version);
    }
}

/// A part as it is written in the result, and what it is.
fn classify(i: usize, part: &str, parameters: u64) -> (String, Kind) {
    let lower = part.to_ascii_lowercase();
    let none = Kind::default();
    if is_version(&lower) {
        return (part.to_owned(), Kind { version: true, ..none });
    }
    if is_number_type(&lower) {
        return (part.to_ascii_uppercase(), Kind { number_type: true, ..none });
    }
    if i > 0 && is_size(&lower) {
        let mut text = part.replace('_', ".");
        // 7b1 is 7.1b
        if let [.., unit, digit @ b'0'..=b'9'] = text.as_bytes() {
            let (unit, digit) = (*unit as char, *digit as char);
            text.truncate(text.len() - 2);
            text.push('.');
            text.extend([digit, unit]);
        }
        if let [.., b'0'..=b'9', b'k' | b'm' | b'b' | b't'] = text.as_bytes() {
            let unit = text.pop().expect("a unit was matched");
            text.push(unit.to_ascii_uppercase());
        }
        let unit = text.chars().next_back().and_then(|unit| " KMBT".find(unit));
        let count: Option<f64> = text.get(..text.len() - 1).and_then(|number| number.parse().ok());
        if let (Some(count), Some(unit)) = (count, unit) {
            let (label, total) = (count * 1000_f64.powi(unit as i32), parameters as f64);
            if parameters > 0 && (label - total).abs() > (7.0 * total / 8.0).floor() {
                // Rather a length of texts.
                let unit = text.pop().expect("a unit was found");
                text.push(unit.to_ascii_lowercase());
                return (text, Kind { finetune: true, ..none });
            }
        }
        return (text, Kind { size: true, ..none });
    }
    let finetune = i > 0 && matches!(lower.as_str(), "chat" | "instruct" | "vision" | "lora");
    (part.to_owned(), Kind { finetune, ..none })
}

/// `2`, `v0.2`, `iter3`
fn is_version(lower: &str) -> bool {
    let number = lower.strip_prefix("iter").or_else(|| lower.strip_prefix('v')).unwrap_or(lower);
    number.split('.').all(is_digits)
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

/// `q4_k_m`, `bf16`
fn is_number_type(lower: &str) -> bool {
    let quantized = lower.strip_prefix('i').unwrap_or(lower).strip_prefix('q').is_some_and(|rest| {
        let mut parts = rest.split('_');
        parts.next().is_some_and(|digit| digit.len() == 1 && is_digits(digit))
            && parts.all(|part| part.len() == 1 && part.bytes().all(|b| b.is_ascii_alphanumeric()))
    });
    let float = lower.strip_prefix('b').unwrap_or(lower).strip_prefix('f');
    quantized || float.is_some_and(|rest| matches!(rest.strip_prefix('p').unwrap_or(rest), "16" | "32"))
}

/// `135m`, `1.5b`, `8x7b`, `a3b`, `7b1`, `mini`
fn is_size(lower: &str) -> bool {
    if matches!(lower, "small" | "mini" | "medium" | "large" | "xl" | "xxl") {
        return true;
    }
    let mut rest = lower.strip_prefix('a').unwrap_or(lower);
    if let Some((_, each)) = rest.split_once('x').filter(|(experts, _)| is_digits(experts)) {
        rest = each;
    }
    // At most one digit behind the unit.
    let rest = match rest.as_bytes() {
        [.., b'k' | b'm' | b'b' | b't', b'0'..=b'9'] => &rest[..rest.len() - 1],
        _ => rest,
    };
    let Some(number) = rest.strip_suffix(['k', 'm', 'b', 't']) else { return false };
    match number.split_once(['.', '_']) {
        Some((whole, part)) => is_digits(whole) && is_digits(part),
        None => is_digits(number),
    }
}

/// Words with capitals, except versions and words that have some already. A letter behind a digit starts
/// anew: `qwen2b` becomes `Qwen2B`.
pub fn title(name: &str) -> String {
    let word = |word: &str| {
        let is_version = word.starts_with(|c: char| c.is_ascii_digit()) || is_version(word);
        let lower = word.chars().any(char::is_alphabetic) && !word.chars().any(char::is_uppercase);
        if is_version || !lower {
            return word.to_owned();
        }
        let mut out = String::with_capacity(word.len());
        let mut inside = false;
        for c in word.chars() {
            if inside {
                out.push(c);
            } else {
                out.extend(c.to_uppercase());
            }
            inside = c.is_alphabetic();
        }
        out
    };
    name.trim().replace('-', " ").split_whitespace().map(word).collect::<Vec<_>>().join(" ")
}

/// `135M`, `1.5B`: two digits at least.
pub fn size_label(parameters: u64) -> String {
    let count = parameters as f64;
    let (scaled, unit) = match count {
        n if n > 1e12 => (n * 1e-12, "T"),
        n if n > 1e9 => (n * 1e-9, "B"),
        n if n > 1e6 => (n * 1e-6, "M"),
        n => (n * 1e-3, "K"),
    };
    let rounded = format!("{scaled:.0}");
    let digits = 2_usize.saturating_sub(rounded.trim_start_matches('0').len());
    format!("{scaled:.digits$}{unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_two_digits_and_names_capitals() {
        let sizes = [
            (361_088, "361K"),
            (36_000, "36K"),
            (1_543_714_304, "1.5B"),
            (134_515_008, "135M"),
            (500, "0.50K"),
        ];
        for (count, label) in sizes {
            assert_eq!(size_label(count), label);
        }
        assert_eq!(title("tiny-llama"), "Tiny Llama");
        assert_eq!(title("qwen2b"), "Qwen2B");
        assert_eq!(title("SmolLM2-135M-instruct-v0.2"), "SmolLM2 135M Instruct v0.2");
    }

    #[test]
    fn names_fall_into_their_parts() {
        let parts = |id: &str, parameters| {
            let name = ModelName::parse(id, parameters);
            [name.basename, name.size_label, name.finetune, name.version].map(Option::unwrap_or_default)
        };
        assert_eq!(parts("tiny-llama", 361_088), ["", "", "", ""]);
        assert_eq!(parts("SmolLM2-135M-Instruct", 134_515_008), ["SmolLM2", "135M", "Instruct", ""]);
        assert_eq!(parts("Mistral-7B-Instruct-v0.3", 7_248_023_552), ["Mistral", "7B", "Instruct", "v0.3"]);
        assert_eq!(parts("Phi-3-mini-4k-instruct", 3_821_079_552), ["Phi-3", "mini", "4k-instruct", ""]);
        assert_eq!(parts("Qwen2.5-0.5B", 494_032_768), ["Qwen2.5", "0.5B", "", ""]);
        assert_eq!(ModelName::parse("org/a-7b1", 0).size_label.unwrap(), "7.1B");
        assert_eq!(ModelName::parse("org/a-7b1", 0).organization.unwrap(), "org");
    }
}
