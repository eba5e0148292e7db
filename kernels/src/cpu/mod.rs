//! The CPU side: one portable body per loop, compiled for each instruction set and picked at run time.
//!
//! `by_isa!` is the only way to processor-specific code here. The bodies are plain Rust without
//! fused multiply-add, and Rust does not reassociate floats, so every instruction set gives the same
//! bits. Matrix products go through the `gemm` crate, which dispatches by itself.

pub mod gemm;
pub mod math;
pub mod quantize;
pub(crate) mod rows;

pub(crate) mod scratch;
pub(crate) mod shared;
pub(crate) mod tile;

/// The instruction sets that loops are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// What every x86-64 (or other) processor has.
    Portable,
    /// AVX2, F16C and BMI2.
    Avx2,
    /// AVX-512 F, BW, DQ and VL on top.
    Avx512,
}

impl Isa {
    /// As people write it: `AVX2`.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "AVX2",
            Isa::Avx512 => "AVX-512",
        }
    }

    /// The best set of this processor, found once.
    pub fn detect() -> Isa {
        #[cfg(target_arch = "x86_64")]
        {
            static ISA: std::sync::OnceLock<Isa> = std::sync::OnceLock::new();
            *ISA.get_or_init(|| {
                let avx2 = is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("f16c")
                    && is_x86_feature_detected!("bmi2");
                let avx512 = is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl");
                match (avx2, avx512) {
                    (true, true) => Isa::Avx512,
                    (true, false) => Isa::Avx2,
                    (false, _) => Isa::Portable,
                }
            })
        }
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Portable
    }
}

/// Defines a function whose body is compiled once per [`Isa`] and dispatched at run time.
///
/// ```ignore
/// by_isa! {
///     /// y += a x
///     pub fn axpy(y: &mut [f32], a: f32, x: &[f32]) {
///         for (y, x) in y.iter_mut().zip(x) { *y += a * x; }
///     }
/// }
/// ```
///
/// becomes `axpy` with an AVX2 and an AVX-512 copy of the loop behind it. Helpers that the body calls
/// must be `#[inline(always)]` to be compiled with it.
macro_rules! by_isa {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$of:ident: $bound:ident>)? ($($arg:ident: $ty:ty),* $(,)?)
        $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name $(<$of: $bound>)? ($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::inline_always, reason = "inlining carries the target features into the loop")]
            fn body $(<$of: $bound>)? ($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,f16c,bmi2")]
                fn avx2 $(<$of: $bound>)? ($($arg: $ty),*) $(-> $ret)? {
                    body $(::<$of>)? ($($arg),*)
                }
                #[target_feature(enable = "avx2,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512 $(<$of: $bound>)? ($($arg: $ty),*) $(-> $ret)? {
                    body $(::<$of>)? ($($arg),*)
                }
                match $crate::cpu::Isa::detect() {
                    $crate::cpu::Isa::Portable => {}
                    // SAFETY: `detect` saw the features on this processor.
                    $crate::cpu::Isa::Avx2 => return unsafe { avx2 $(::<$of>)? ($($arg),*) },
                    // SAFETY: `detect` saw the features on this processor.
                    $crate::cpu::Isa::Avx512 => return unsafe { avx512 $(::<$of>)? ($($arg),*) },
                }
            }
            body $(::<$of>)? ($($arg),*)
        }
    };
}
pub(crate) use by_isa;

#[cfg(test)]
mod tests {
    by_isa! {
        fn axpy(y: &mut [f32], a: f32, x: &[f32]) {
            for (y, x) in y.iter_mut().zip(x) {
                *y += a * x;
            }
        }
    }

    #[test]
    fn every_instruction_set_computes_the_portable_result() {
        let x: Vec<f32> = (0..37).map(|i| i as f32 * 0.3).collect();
        let mut y = vec![1.0; 37];
        axpy(&mut y, 0.7, &x);
        for (y, x) in y.iter().zip(&x) {
            assert_eq!(*y, 1.0 + 0.7 * x);
        }
    }
}
