//! Fuzzes the target `tokenizer_gguf`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| qpeft_fuzz::check("tokenizer_gguf", data));
