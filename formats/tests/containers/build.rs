//! Files byte by byte, without any help of the writers under test.

/// Bytes of a GGUF file.
#[derive(Clone, Default)]
pub struct Gguf(pub Vec<u8>);

impl Gguf {
    /// Magic, version and the two counts.
    pub fn new(version: u32, tensors: u64, keys: u64) -> Gguf {
        Gguf(b"GGUF".to_vec()).u32(version).u64(tensors).u64(keys)
    }

    pub fn bytes(mut self, bytes: &[u8]) -> Gguf {
        self.0.extend(bytes);
        self
    }

    pub fn u32(self, x: u32) -> Gguf {
        self.bytes(&x.to_le_bytes())
    }

    pub fn u64(self, x: u64) -> Gguf {
        self.bytes(&x.to_le_bytes())
    }

    pub fn string(self, s: &str) -> Gguf {
        self.u64(s.len() as u64).bytes(s.as_bytes())
    }

    /// A key with a value of type u32.
    pub fn key_u32(self, key: &str, value: u32) -> Gguf {
        self.string(key).u32(4).u32(value)
    }

    /// The description of a tensor.
    pub fn tensor(self, name: &str, shape: &[u64], ty: u32, offset: u64) -> Gguf {
        let start = self.string(name).u32(shape.len() as u32);
        shape.iter().fold(start, |file, &dim| file.u64(dim)).u32(ty).u64(offset)
    }

    /// Zeros up to a multiple of `alignment`, then `len` bytes that count up.
    pub fn data(mut self, alignment: usize, len: usize) -> Gguf {
        self.0.resize(self.0.len().next_multiple_of(alignment), 0);
        self.0.extend((0..len).map(|i| i as u8));
        self
    }
}

/// Bytes of a safetensors file.
pub fn safetensors(header: &str, data_len: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend((0..data_len).map(|i| i as u8));
    bytes
}
