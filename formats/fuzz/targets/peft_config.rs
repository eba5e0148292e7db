//! Fuzzes the target `peft_config`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| qpeft_fuzz::check("peft_config", data));
