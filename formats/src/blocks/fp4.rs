//! What MXFP4 and NVFP4 share: the eight magnitudes of E2M1, doubled to be whole, and a sign bit.
//!
//! Codes 0..8 stand for 0, 1, 2, 3, 4, 6, 8, 12; codes 8..16 for their negatives. The scales of both
//! types are halved to make up for the doubling, as in ggml.

const MAGNITUDES: [f32; 8] = [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0];

/// The number of a code in 0..16. Arithmetic, because a table lookup would not be vectorized.
#[inline(always)]
pub(super) fn value(code: u8) -> i8 {
    let c = code & 7;
    let magnitude = (c + c.saturating_sub(4) + 2 * c.saturating_sub(6)) as i8;
    let sign = -((code >> 3) as i8);
    (magnitude ^ sign) - sign
}

/// The code whose number times `d` is nearest to each element; the first of equally near ones.
///
/// Distances are rounded to f32 like the reference's, and only those to numbers of the element's own
/// sign are looked at: the others are never strictly smaller.
#[inline(always)]
pub(super) fn nearest<const N: usize>(x: &[f32; N], d: f32) -> [u8; N] {
    let candidates = MAGNITUDES.map(|magnitude| magnitude * d);
    let mut codes = [0; N];
    // A vector at a time, so that its distances stay in registers.
    for (x, codes) in x.as_chunks::<8>().0.iter().zip(codes.as_chunks_mut::<8>().0) {
        let magnitudes = x.map(f32::abs);
        let (mut best, mut code) = (magnitudes, [0u32; 8]);
        for c in 1..8 {
            for l in 0..8 {
                let distance = (candidates[c] - magnitudes[l]).abs();
                code[l] = if distance < best[l] { c as u32 } else { code[l] };
                best[l] = if distance < best[l] { distance } else { best[l] };
            }
        }
        for l in 0..8 {
            let negative = (x[l] < 0.0) & (code[l] != 0);
            codes[l] = code[l] as u8 | (u8::from(negative) << 3);
        }
    }
    codes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_stand_for_their_numbers_and_the_nearest_is_the_code_itself() {
        let numbers = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];
        for (code, number) in numbers.into_iter().enumerate() {
            assert_eq!(value(code as u8), number, "code {code}");
            // Both zeros are code 0.
            let expected = if code == 8 { 0 } else { code as u8 };
            assert_eq!(nearest(&[f32::from(number) * 0.25; 8], 0.25), [expected; 8]);
        }
    }

    #[test]
    fn of_equally_near_codes_the_first_is_taken() {
        assert_eq!(nearest(&[0.5, 2.5, 5.0, 7.0, 10.0, -10.0, -0.5, 100.0], 1.0), [0, 2, 4, 5, 6, 14, 0, 7]);
        // So far away that all distances round to the same number.
        assert_eq!(nearest(&[1e30, -1e30, 1e30, -1e30, 1e30, -1e30, 1e30, -1e30], 1.0), [0; 8]);
    }
}
