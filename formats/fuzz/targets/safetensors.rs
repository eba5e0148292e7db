//! Fuzzes the target `safetensors`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| qpeft_fuzz::check("safetensors", data));
