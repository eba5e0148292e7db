//! A conversation as the text that the model was tuned on: the chat template of its files.
//!
//! Templates are written for Jinja2 as transformers sets it up, so this sets up minijinja the same way:
//! block lines leave no trace, `tojson` writes what Python's `json.dumps` writes, and `raise_exception`
//! and `strftime_now` exist. `{% generation %}`, which marks spans and prints nothing, is neutralised.

mod functions;

pub use functions::now;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Value as Jinja};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// One turn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// Usually a string; templates may also take a list of parts, or none beside `tool_calls`.
    #[serde(default)]
    pub content: Value,
    /// The other fields (`name`, `tool_calls`, ...), handed to the template as they are.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Message {
    /// A turn of plain text.
    pub fn new(role: &str, content: impl Into<String>) -> Message {
        Message { role: role.to_owned(), content: Value::String(content.into()), extra: Map::new() }
    }
}

/// A compiled chat template with the texts of the begin and end tokens.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: Option<String>,
    eos: Option<String>,
}

/// A template that does not compile, or refuses a conversation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("chat template{}: {message}", line.map(|n| format!(", line {n}")).unwrap_or_default())]
pub struct ChatTemplateError {
    /// Line of the template, from 1.
    pub line: Option<usize>,
    /// What is wrong; for `raise_exception` the template's own words.
    pub message: String,
    /// Whether the template refused the conversation on purpose.
    pub raised: bool,
}

impl ChatTemplateError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        let hint = if self.raised {
            "the template does not take this conversation: check the order of roles and the system message"
        } else {
            "the template is not one that can be run; format prompt and completion plainly with `--no-chat-template`"
        };
        Some(hint.into())
    }

    fn new(e: &minijinja::Error) -> ChatTemplateError {
        let raised = e.detail().and_then(|detail| detail.strip_prefix(functions::RAISED));
        let message = match (raised, e.detail()) {
            (Some(words), _) => words.to_owned(),
            (None, Some(detail)) => format!("{}: {detail}", e.kind()),
            (None, None) => e.kind().to_string(),
        };
        ChatTemplateError { line: e.line(), message, raised: raised.is_some() }
    }
}

const NAME: &str = "chat_template";

/// Instructions that one rendering may take: a second of work. A turn of a real conversation takes some
/// hundred; a template from a hostile file could loop for ever.
const FUEL: u64 = 10_000_000;

impl ChatTemplate {
    /// Compiles `source`. Templates that print the date see the one of this moment for as long as they
    /// live; [`ChatTemplate::at`] fixes another.
    pub fn new(
        source: &str,
        bos: Option<String>,
        eos: Option<String>,
    ) -> Result<ChatTemplate, ChatTemplateError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| ChatTemplateError::new(&e))?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_fuel(Some(FUEL));
        functions::add(&mut environment);
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(|e| ChatTemplateError::new(&e))?;
        Ok(ChatTemplate { environment, bos, eos }.at(functions::now()))
    }

    /// The same template at another time (seconds since 1970, UTC): a resumed run renders what the
    /// first one rendered.
    #[must_use]
    pub fn at(mut self, unix_seconds: i64) -> ChatTemplate {
        functions::set_clock(&mut self.environment, unix_seconds);
        self
    }

    /// The text of a conversation. `add_generation_prompt` appends what precedes the model's answer.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, ChatTemplateError> {
        let mut context = vec![
            ("messages", Jinja::from(Serde(messages))),
            ("add_generation_prompt", Jinja::from(add_generation_prompt)),
            // transformers always defines these, as None.
            ("tools", Jinja::from(())),
            ("documents", Jinja::from(())),
        ];
        context.extend(self.bos.as_ref().map(|token| ("bos_token", Jinja::from(token.as_str()))));
        context.extend(self.eos.as_ref().map(|token| ("eos_token", Jinja::from(token.as_str()))));
        let template = self.environment.get_template(NAME).map_err(|e| ChatTemplateError::new(&e))?;
        template.render(Jinja::from_pairs(context)).map_err(|e| ChatTemplateError::new(&e))
    }
}

/// `{% generation %}` and `{% endgeneration %}` as a block that is always taken; the signs that trim
/// white space stay where they were.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let (text, tag) = rest.split_at(open);
        // From behind the opening sign: in `{%}` the two share their middle.
        let Some(close) = tag[2..].find("%}").map(|at| at + 2) else { break };
        out.push_str(text);
        let inside = &tag[2..close];
        let word = inside.trim_matches(['-', '+']).trim();
        match word {
            "generation" => out.push_str(&tag[..close + 2].replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&tag[..close + 2].replacen("endgeneration", "endif", 1)),
            _ => out.push_str(&tag[..close + 2]),
        }
        rest = &tag[close + 2..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn testdata(name: &str) -> Value {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/tokenizer").join(name);
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    fn render(source: &str) -> Result<String, ChatTemplateError> {
        let template = ChatTemplate::new(source, Some("<s>".into()), Some("</s>".into()))?;
        template
            .at(1_000_000_000)
            .render(&[Message::new("user", "Hi"), Message::new("assistant", "Yo")], true)
    }

    #[test]
    fn smollm2_conversations_render_as_in_transformers() {
        let golden = testdata("chat.json");
        let text = |key: &str| golden[key].as_str().map(str::to_owned);
        let template =
            ChatTemplate::new(&text("chat_template").unwrap(), text("bos_token"), text("eos_token")).unwrap();
        let conversations = golden["conversations"].as_array().unwrap();
        assert_eq!(conversations.len(), 3);
        for c in conversations {
            let messages: Vec<Message> = serde_json::from_value(c["messages"].clone()).unwrap();
            let rendered = template.render(&messages, c["add_generation_prompt"].as_bool().unwrap()).unwrap();
            assert_eq!(rendered, c["rendered"].as_str().unwrap());
        }
    }

    #[test]
    fn block_lines_leave_no_trace_and_tokens_have_names() {
        let source = "{{ bos_token }}\n  {% for m in messages %}\n{{ m['role'].upper() }}: {{ m.content | trim }}\n  {% endfor %}\n{{ eos_token }}\n";
        assert_eq!(render(source).unwrap(), "<s>\nUSER: Hi\nASSISTANT: Yo\n</s>");
    }

    #[test]
    fn python_methods_namespaces_slices_and_loop_control_work() {
        let source = "{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% if loop.index > 1 %}{% break %}{% endif %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ 'a-b'.split('-')[1] }}{{ ' x '.strip() }}{{ messages[0].get('name', 'none') }}{{ 'Y' if 'Hi'.startswith('H') }}{{ 'N' if tools is none }}{{ tools }}{{ true }}";
        assert_eq!(render(source).unwrap(), "1bxnoneYNNoneTrue");
    }

    #[test]
    fn generation_tags_print_nothing_and_keep_their_trimming() {
        let source = "a {%- generation -%} b {%- endgeneration %} c{% generation %}d{% endgeneration %}";
        assert_eq!(render(source).unwrap(), "ab cd");
        assert_eq!(
            without_generation_tags("{{ generation }} {% if generation %} {%"),
            "{{ generation }} {% if generation %} {%"
        );
    }

    #[test]
    fn a_template_that_does_not_end_is_stopped() {
        let nested = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
        let e = render(nested).unwrap_err();
        assert!(e.to_string().contains("ran out of fuel") && !e.raised, "{e}");
    }

    #[test]
    fn an_error_names_the_line_of_the_template() {
        let e = render("a\nb\n{% for %}").unwrap_err();
        assert_eq!((e.line, e.raised), (Some(3), false));
        assert!(e.to_string().starts_with("chat template, line 3: "), "{e}");
        let e = render("a\n{{ raise_exception('roles must alternate') }}").unwrap_err();
        assert_eq!(e.to_string(), "chat template, line 2: roles must alternate");
        assert!(e.raised && e.hint().unwrap().contains("order of roles"));
        assert!(render("{%}").is_err() && render("{% generation %}{%}").is_err());
        let e = render("{{ nothing.at.all }}").unwrap_err();
        assert!(!e.raised && e.hint().unwrap().contains("--no-chat-template"), "{e}");
    }
}
