//! Fuzzes the target `checkpoint`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| qpeft_fuzz::check("checkpoint", data));
