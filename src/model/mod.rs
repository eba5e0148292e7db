//! The decoder and what speaks its language: tokenizer and chat template.

pub mod chat;
pub mod tokenizer;
