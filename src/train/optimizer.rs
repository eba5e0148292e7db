//! AdamW over the flat parameter buffer: its two moments, the gradients, clipping.

use qpeft_kernels::ops::adamw::{AdamW, adamw_update_clipped};
use qpeft_kernels::ops::global_norm::global_norm_clip;
use qpeft_kernels::{Device, Tensor, ViewMut};

use crate::error::Result;
use crate::model::Parameters;

/// Gradients and moments, each flat like the parameters.
#[derive(Debug)]
pub struct Optimizer {
    /// Constants of the update.
    pub hyper: AdamW,
    /// Largest allowed gradient norm; 0 switches clipping off.
    pub max_grad_norm: f64,
    /// Updates done: the bias correction counts them.
    pub updates: u64,
    /// Sum of the gradients of this step's micro-batches.
    grads: Tensor,
    /// Running mean of the gradients.
    m: Tensor,
    /// Running mean of their squares.
    v: Tensor,
    /// (1, 3): norm of the last step's gradients, what they were multiplied by, and whether they were unusable.
    clip: Tensor,
}

impl Optimizer {
    /// Zero moments for `count` parameters.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn new(device: &Device, count: usize, hyper: AdamW, max_grad_norm: f64) -> Result<Optimizer> {
        let zeros = || Tensor::zeros(device, 1, count);
        Ok(Optimizer {
            hyper,
            max_grad_norm,
            updates: 0,
            grads: zeros()?,
            m: zeros()?,
            v: zeros()?,
            clip: Tensor::zeros(device, 1, 3)?,
        })
    }

    /// The flat gradients, to add to.
    pub fn grads(&mut self) -> ViewMut<'_> {
        self.grads.view_mut()
    }

    /// Clips the accumulated gradients, updates the parameters, and empties the gradients. Gradients that are
    /// not finite update nothing; [`Optimizer::grad_norm`] tells.
    ///
    /// # Errors
    /// An op refuses.
    pub fn step(&mut self, params: &mut Parameters, learning_rate: f64) -> Result<()> {
        let max_norm = if self.max_grad_norm > 0.0 { self.max_grad_norm as f32 } else { f32::INFINITY };
        global_norm_clip(self.clip.view_mut(), self.grads.view(), max_norm)?;
        self.updates += 1;
        adamw_update_clipped(
            params.values.view_mut(),
            self.m.view_mut(),
            self.v.view_mut(),
            params.rounded.as_mut().map(Tensor::view_mut),
            self.grads.view(),
            self.clip.view(),
            &self.hyper,
            learning_rate as f32,
            self.updates,
        )?;
        Ok(self.grads.view_mut().zero("adamw")?)
    }

    /// The norm of the gradients of the last step, before clipping. On CUDA this waits for the stream.
    ///
    /// # Errors
    /// The device refuses to be read.
    pub fn grad_norm(&self) -> Result<f64> {
        Ok(f64::from(self.clip.read()?[0]))
    }

    /// The moments (m, v) in host memory, for a checkpoint.
    ///
    /// # Errors
    /// The device refuses to be read.
    pub fn moments(&self) -> Result<(Vec<f32>, Vec<f32>)> {
        Ok((self.m.read()?, self.v.read()?))
    }

    /// Takes the moments of a checkpoint.
    ///
    /// # Errors
    /// Their number differs from that of the parameters.
    pub fn restore(&mut self, m: &[f32], v: &[f32], updates: u64) -> Result<()> {
        self.m.write(m)?;
        self.v.write(v)?;
        self.updates = updates;
        Ok(())
    }

    /// Bytes of gradients and moments.
    pub fn bytes(&self) -> usize {
        3 * self.grads.len() * size_of::<f32>()
    }
}
