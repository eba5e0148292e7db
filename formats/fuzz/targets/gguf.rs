//! Fuzzes the target `gguf`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| qpeft_fuzz::check("gguf", data));
