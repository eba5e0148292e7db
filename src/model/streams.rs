//! The residual stream between the layers: kept on the device, or in pinned host memory with a few of them on the
//! device at a time.
//!
//! Going up, each stream is copied out while the next layer computes; going down, each is fetched while the layer
//! above computes. A ring of device buffers holds those at work.

use qpeft_kernels::cuda::Buffer;
use qpeft_kernels::cuda::transfer::Lane;
use qpeft_kernels::{Device, Tensor, View, ViewMut};

use crate::error::Result;

/// Streams on the device at a time, where the others are on the host: the one that enters a layer, the one that
/// leaves it, and one each way on the bus.
const RING: usize = 4;

/// The stream entering every layer, and the one leaving the last.
#[derive(Debug)]
pub struct Streams {
    /// All of them, or a ring.
    buffers: Vec<Tensor>,
    host: Option<Host>,
}

/// Those that are not on the device.
#[derive(Debug)]
struct Host {
    lane: Lane,
    /// By layer.
    copies: Vec<Buffer>,
    /// The stream that each buffer of the ring holds or is being given.
    holds: Vec<Option<usize>>,
}

impl Streams {
    /// `count` streams of (rows, cols); `on_host`: all but a few of them in host memory.
    ///
    /// # Errors
    /// The device or the host is out of memory.
    pub fn new(device: &Device, count: usize, rows: usize, cols: usize, on_host: bool) -> Result<Streams> {
        let on_host = on_host && count > RING;
        let here = if on_host { RING } else { count };
        let buffers: Vec<Tensor> =
            (0..here).map(|_| Tensor::activations(device, rows, cols)).collect::<Result<_, _>>()?;
        let host = match device.cuda().filter(|_| on_host) {
            Some(cuda) => Some(Host {
                lane: Lane::new(cuda, RING)?,
                copies: (0..count).map(|_| cuda.alloc_host(buffers[0].bytes())).collect::<Result<_, _>>()?,
                holds: vec![None; RING],
            }),
            None => None,
        };
        Ok(Streams { buffers, host })
    }

    /// The stream entering `layer`, to read.
    pub fn read(&self, layer: usize, rows: usize) -> View<'_> {
        self.buffers[layer % self.buffers.len()].top(rows)
    }

    /// The stream entering `layer`, to write.
    pub fn write(&mut self, layer: usize, rows: usize) -> ViewMut<'_> {
        let index = layer % self.buffers.len();
        self.buffers[index].top_mut(rows)
    }

    /// The streams that enter and leave `layer`.
    pub fn around(&mut self, layer: usize, rows: usize) -> (View<'_>, ViewMut<'_>) {
        let n = self.buffers.len();
        let [enter, leave] = self
            .buffers
            .get_disjoint_mut([layer % n, (layer + 1) % n])
            .expect("two neighbouring streams are distinct");
        (enter.top(rows), leave.top_mut(rows))
    }

    /// Whether most of them are in host memory.
    pub fn on_host(&self) -> bool {
        self.host.is_some()
    }

    /// Before the first stream is written.
    ///
    /// # Errors
    /// The device refuses.
    pub fn begin(&mut self) -> Result<()> {
        let Some(host) = &mut self.host else { return Ok(()) };
        host.holds.fill(None);
        host.holds[0] = Some(0);
        Ok(host.lane.wait_for(0)?)
    }

    /// Before `layer` runs forward for the first time: the buffer of the stream that leaves it must be free.
    ///
    /// # Errors
    /// The device refuses.
    pub fn before_forward(&mut self, layer: usize) -> Result<()> {
        let Some(host) = &mut self.host else { return Ok(()) };
        let slot = (layer + 1) % RING;
        host.lane.wait_for(slot)?;
        host.holds[slot] = Some(layer + 1);
        Ok(())
    }

    /// After `layer` ran forward: the stream that entered it goes to the host.
    ///
    /// # Errors
    /// The device refuses.
    pub fn after_forward(&mut self, layer: usize, rows: usize) -> Result<()> {
        let Some(host) = &self.host else { return Ok(()) };
        let (ptr, bytes) = place(&self.buffers[layer % RING], rows)?;
        Ok(host.lane.to_host(layer % RING, &host.copies[layer], ptr, bytes)?)
    }

    /// Before `layer` runs backward: the stream that enters it is here, and that of the layer below on its way.
    ///
    /// # Errors
    /// The device refuses.
    pub fn before_backward(&mut self, layer: usize, rows: usize) -> Result<()> {
        self.fetch(layer, rows)?;
        if layer > 0 {
            self.fetch(layer - 1, rows)?;
        }
        let Some(host) = &self.host else { return Ok(()) };
        Ok(host.lane.wait_for(layer % RING)?)
    }

    /// After the backward pass: nothing is under way any more.
    ///
    /// # Errors
    /// The device refuses.
    pub fn after_backward(&self) -> Result<()> {
        let Some(host) = &self.host else { return Ok(()) };
        (0..RING).try_for_each(|slot| Ok(host.lane.wait_for(slot)?))
    }

    fn fetch(&mut self, layer: usize, rows: usize) -> Result<()> {
        let Some(host) = &mut self.host else { return Ok(()) };
        let slot = layer % RING;
        if host.holds[slot] == Some(layer) {
            return Ok(());
        }
        let (ptr, bytes) = place(&self.buffers[slot], rows)?;
        host.lane.to_device(slot, ptr, &host.copies[layer], bytes)?;
        host.holds[slot] = Some(layer);
        Ok(())
    }

    /// The buffers on the device.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.buffers.iter()
    }
}

/// Address and bytes of the first rows of a tensor without padding.
fn place(tensor: &Tensor, rows: usize) -> Result<(u64, usize)> {
    let matrix = tensor.top(rows).matrix("stream")?;
    Ok((matrix.ptr, rows * matrix.stride * matrix.dtype.size()))
}
