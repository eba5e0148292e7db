//! Fuzzes the target `gguf_rewrite`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| qpeft_fuzz::check("gguf_rewrite", data));
