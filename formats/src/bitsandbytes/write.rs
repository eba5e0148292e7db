//! A packed weight to the tensors of a checkpoint, with bitsandbytes' names, types and shapes.

use super::blob::Blob;
use super::read::state_key;
use super::{FourBit, Scales};
use crate::file::Bytes;
use crate::safetensors::{Dtype, TensorView};

/// f32 as little-endian bytes.
pub(super) fn float_bytes(values: &[f32]) -> Bytes {
    values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>().into()
}

impl FourBit {
    /// The tensors that store the weight under `name`; the first is the one of that name.
    pub fn tensors(&self, name: &str) -> Vec<TensorView> {
        let tensor = |suffix: &str, dtype, shape: &[usize], bytes| TensorView {
            name: format!("{name}{suffix}"),
            dtype,
            shape: shape.to_vec(),
            bytes,
        };
        let blocks = self.state.blocks();
        let mut tensors = vec![tensor("", Dtype::U8, &[self.codes.len(), 1], self.codes.clone())];
        let mut nested = None;
        match &self.scales {
            Scales::Plain(absmax) => tensors.push(tensor(".absmax", Dtype::F32, &[blocks], absmax.clone())),
            Scales::Nested(scales) => {
                nested = Some((scales.blocksize, scales.offset));
                let (absmax, map) = (float_bytes(&scales.absmax), float_bytes(&scales.map[..]));
                tensors.extend([
                    tensor(".absmax", Dtype::U8, &[blocks], scales.codes.clone()),
                    tensor(".nested_absmax", Dtype::F32, &[scales.absmax.len()], absmax),
                    tensor(".nested_quant_map", Dtype::F32, &[256], map),
                ]);
            }
        }
        let table = float_bytes(self.state.quant_type.table());
        tensors.push(tensor(".quant_map", Dtype::F32, &[16], table));
        let json = Blob { state: self.state, nested }.to_bytes();
        tensors.push(TensorView {
            name: state_key(name, self.state.quant_type),
            dtype: Dtype::U8,
            shape: vec![json.len()],
            bytes: json.into(),
        });
        tensors
    }
}
