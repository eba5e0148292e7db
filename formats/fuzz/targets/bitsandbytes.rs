//! Fuzzes the target `bitsandbytes`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| qpeft_fuzz::check("bitsandbytes", data));
