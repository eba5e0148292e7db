//! Fuzzes the target `safetensors_rewrite`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| qpeft_fuzz::check("safetensors_rewrite", data));
