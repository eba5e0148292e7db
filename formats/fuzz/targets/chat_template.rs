//! Fuzzes the target `chat_template`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| qpeft_fuzz::check("chat_template", data));
