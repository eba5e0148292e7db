//! Fuzzes the target `tokenizer_hf`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| qpeft_fuzz::check("tokenizer_hf", data));
