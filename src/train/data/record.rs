//! One line of JSON as a record of the file's shape.

use serde_json::{Map, Value};

use super::DataOptions;
use super::error::DataErrorKind;
use crate::model::chat::Message;

type Result<T> = std::result::Result<T, DataErrorKind>;
type Object = Map<String, Value>;

/// The shape of a file's records, decided by the first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Shape {
    Messages,
    Pair { prompt: String, completion: String },
    Text,
    Tokens,
}

/// What a line says.
#[derive(Debug, PartialEq)]
pub(super) enum Record {
    /// Assistant turns from `train_from` on carry loss.
    Conversation {
        field: String,
        messages: Vec<Message>,
        train_from: usize,
    },
    Pair {
        prompt: String,
        completion: String,
    },
    Text(String),
    Tokens {
        input_ids: Vec<i64>,
        labels: Option<Vec<i64>>,
        attention_mask: Option<Vec<i64>>,
    },
}

/// The object of a line.
pub(super) fn parse(line: &[u8]) -> Result<Object> {
    let text = std::str::from_utf8(line).map_err(|_| DataErrorKind::NotUtf8)?;
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(DataErrorKind::NotJson { message: format!("found {}", kind_of(&other)) }),
        // The parser counts lines inside of this one.
        Err(e) => {
            let message = e.to_string();
            let message = message.split(" at line ").next().unwrap_or_default();
            Err(DataErrorKind::NotJson { message: format!("{message} at column {}", e.column()) })
        }
    }
}

impl Shape {
    /// Fields that were named on the command line win over fields that are recognised.
    pub(super) fn detect(object: &Object, options: &DataOptions) -> Result<Shape> {
        let named = options.prompt_field.is_some() || options.completion_field.is_some();
        let name =
            |field: &Option<String>, default: &str| field.clone().unwrap_or_else(|| default.to_owned());
        let prompt = name(&options.prompt_field, "prompt");
        let completion = name(&options.completion_field, "completion");
        let has = |field: &str| object.contains_key(field);
        if named || (has(&prompt) && has(&completion)) {
            return Ok(Shape::Pair { prompt, completion });
        }
        let shapes = [("messages", Shape::Messages), ("input_ids", Shape::Tokens), ("text", Shape::Text)];
        let found = shapes.into_iter().find(|(field, _)| has(field)).map(|(_, shape)| shape);
        found.ok_or_else(|| DataErrorKind::UnknownShape { keys: object.keys().cloned().collect() })
    }
}

impl Record {
    /// Reads `object` as a record of `shape`.
    pub(super) fn read(object: &Object, shape: &Shape) -> Result<Record> {
        let field = |name: &str| {
            object.get(name).ok_or_else(|| DataErrorKind::MissingField {
                field: name.to_owned(),
                keys: object.keys().cloned().collect(),
            })
        };
        match shape {
            Shape::Messages => {
                let messages = messages("messages", field("messages")?)?;
                Ok(Record::Conversation { field: "messages".into(), messages, train_from: 0 })
            }
            Shape::Pair { prompt, completion } => {
                pair(prompt, field(prompt)?, completion, field(completion)?)
            }
            Shape::Text => Ok(Record::Text(string("text", field("text")?)?)),
            Shape::Tokens => Ok(Record::Tokens {
                input_ids: integers("input_ids", field("input_ids")?)?,
                labels: object.get("labels").map(|labels| integers("labels", labels)).transpose()?,
                attention_mask: object
                    .get("attention_mask")
                    .map(|mask| integers("attention_mask", mask))
                    .transpose()?,
            }),
        }
    }
}

fn pair(prompt_field: &str, prompt: &Value, completion_field: &str, completion: &Value) -> Result<Record> {
    if !prompt.is_array() && !completion.is_array() {
        let (prompt, completion) = (string(prompt_field, prompt)?, string(completion_field, completion)?);
        return Ok(Record::Pair { prompt, completion });
    }
    let mut turns = messages(prompt_field, prompt)?;
    let train_from = turns.len();
    turns.extend(messages(completion_field, completion)?);
    Ok(Record::Conversation { field: prompt_field.to_owned(), messages: turns, train_from })
}

fn messages(field: &str, value: &Value) -> Result<Vec<Message>> {
    let wrong = |field: String, expected, found: &Value| DataErrorKind::Field {
        field,
        expected,
        found: kind_of(found),
    };
    let expected = "a list of messages";
    let list = value.as_array().ok_or_else(|| wrong(field.to_owned(), expected, value))?;
    if list.is_empty() {
        return Err(wrong(field.to_owned(), expected, value));
    }
    let read = |(i, message): (usize, &Value)| {
        let place = format!("{field}[{i}]");
        if !message["role"].is_string() {
            return Err(wrong(place + ".role", "a string", &message["role"]));
        }
        let content = &message["content"];
        let calls = content.is_null() && message["tool_calls"].is_array();
        if !(content.is_string() || content.is_array() || calls) {
            return Err(wrong(place + ".content", "a string", content));
        }
        serde_json::from_value(message.clone()).map_err(|_| wrong(place, "a message", message))
    };
    list.iter().enumerate().map(read).collect()
}

fn string(field: &str, value: &Value) -> Result<String> {
    let wrong =
        || DataErrorKind::Field { field: field.to_owned(), expected: "a string", found: kind_of(value) };
    value.as_str().map(str::to_owned).ok_or_else(wrong)
}

fn integers(field: &str, value: &Value) -> Result<Vec<i64>> {
    let wrong = |field: String, value: &Value| DataErrorKind::Field {
        field,
        expected: "integers",
        found: kind_of(value),
    };
    let list = value.as_array().ok_or_else(|| wrong(field.to_owned(), value))?;
    let read =
        |(i, value): (usize, &Value)| value.as_i64().ok_or_else(|| wrong(format!("{field}[{i}]"), value));
    list.iter().enumerate().map(read).collect()
}

fn kind_of(value: &Value) -> String {
    match value {
        Value::Null => "nothing".into(),
        Value::Bool(b) => format!("`{b}`"),
        Value::Number(n) => format!("`{n}`"),
        Value::String(_) => "a string".into(),
        Value::Array(list) if list.is_empty() => "an empty list".into(),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
    }
}
