//! `qpeft generate`: a quick look at what was trained.

use super::args::GenerateArgs;
use super::printer::Printer;
use super::session::{Session, open_device};
use crate::error::Error;
use crate::model::chat::Message;
use crate::model::sample::{Sampling, generate};

/// Runs the command.
///
/// # Errors
/// A file is refused, the adapter belongs to other weights, or the prompt is longer than the context.
pub fn run(args: &GenerateArgs, printer: &Printer) -> anyhow::Result<()> {
    let device = open_device(&args.compute, printer)?;
    let session = Session::open(&args.model, &device)?;
    let prompt = prompt_tokens(&session, &args.prompt, args.raw, args.chat)?;
    let sampling = Sampling { temperature: args.temperature, top_p: args.top_p, seed: args.seed };
    let positions = session.decoder.config.max_positions;
    let room = positions.saturating_sub(prompt.len());
    if room > 0 && args.max_new_tokens > room {
        printer.warn(&format!(
            "at most {room} tokens fit behind the prompt: the model has {positions} positions"
        ));
    }
    printer.data(&generate_text(&session, &prompt, args.max_new_tokens, &sampling)?)?;
    Ok(printer.data("\n")?)
}

/// The prompt as tokens: a user's message in the chat template, or the text as it is.
///
/// # Errors
/// A chat is asked for and the model has no template, or the template refuses.
pub fn prompt_tokens(session: &Session, prompt: &str, raw: bool, chat: bool) -> anyhow::Result<Vec<u32>> {
    let template = if raw { None } else { session.tokenizer.template()? };
    match template {
        Some(template) => {
            let text = template.render(&[Message::new("user", prompt)], true)?;
            Ok(session.tokenizer.encode(&text, false)?)
        }
        None if chat => Err(Error::refused("the model has no chat template")
            .with_hint("leave out `--chat` to continue the prompt as it is")
            .into()),
        None => Ok(session.tokenizer.encode(prompt, true)?),
    }
}

/// The text that follows `prompt`, without the token that ended it.
///
/// # Errors
/// The prompt is empty or does not fit the model's positions.
pub fn generate_text(
    session: &Session,
    prompt: &[u32],
    max_new_tokens: usize,
    sampling: &Sampling,
) -> anyhow::Result<String> {
    session.decoder.config.check_tokens(prompt)?;
    let stop = session.tokenizer.end_of_generation();
    let tokens =
        generate(&session.decoder, &session.params, prompt, max_new_tokens, sampling, |t| stop.contains(&t))?;
    Ok(session.tokenizer.decode(&tokens, true)?)
}
