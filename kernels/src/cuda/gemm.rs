//! Matrix products through cuBLASLt, with the plan of every shape kept.
//!
//! A plan begins with the library's first guess of an algorithm; [`Cuda::tuning`] finds the fastest one (`tune.rs`).
//! cuBLASLt thinks in columns: a row-major matrix is the transpose of a column-major one with the same leading
//! dimension, so C = A B is asked for as C^T = B^T A^T, with the operands swapped.

pub(crate) mod tune;

use std::collections::HashMap;
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::sync::PoisonError;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;

use super::{Cuda, Scratch};
use crate::error::{Error, Result, check};
use crate::tensor::Dtype;

const OP: &str = "gemm";

/// A product with a size up to this is that of an adapter's factor, bound by memory; a profile has them apart.
const LOW_RANK: usize = 64;

/// What cuBLASLt may use beside the operands; the size that NVIDIA recommends for Hopper.
pub const WORKSPACE: usize = 32 << 20;

/// A row-major matrix in device memory.
#[derive(Debug, Clone, Copy)]
pub struct Matrix {
    /// Address of the first element.
    pub ptr: u64,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Elements between the starts of two rows.
    pub stride: usize,
    /// Element type.
    pub dtype: Dtype,
}

impl Matrix {
    /// The alignment that a plan may rely on.
    fn alignment(self) -> u32 {
        let bits = self.ptr | (self.stride * self.dtype.size()) as u64;
        1 << bits.trailing_zeros().min(8)
    }
}

/// A matrix as it enters a product.
#[derive(Debug, Clone, Copy)]
pub struct Operand {
    matrix: Matrix,
    transposed: bool,
}

impl Operand {
    /// (rows, cols) as they enter the product.
    fn shape(self) -> (usize, usize) {
        let Matrix { rows, cols, .. } = self.matrix;
        if self.transposed { (cols, rows) } else { (rows, cols) }
    }
}

impl From<Matrix> for Operand {
    fn from(matrix: Matrix) -> Operand {
        Operand { matrix, transposed: false }
    }
}

/// The transpose of a matrix, without moving it.
pub fn transposed(matrix: Matrix) -> Operand {
    Operand { matrix, transposed: true }
}

/// Everything that a plan depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    m: usize,
    n: usize,
    k: usize,
    transposed: [bool; 2],
    /// Of a, b, c and the result; as are the alignments.
    strides: [usize; 4],
    dtypes: [Dtype; 3],
    alignments: [u32; 4],
}

type Algo = sys::cublasLtMatmulAlgo_t;

/// Algorithms that cuBLASLt is asked for.
const CANDIDATES: usize = 8;

#[derive(Debug)]
struct Plan {
    desc: sys::cublasLtMatmulDesc_t,
    /// Theirs: b, a, c, the result.
    layouts: [sys::cublasLtMatrixLayout_t; 4],
    /// The first is in use; there are others as long as nothing was measured.
    algos: Vec<Algo>,
}

/// The handle and the plans of all shapes so far.
#[derive(Debug)]
pub(super) struct Plans {
    handle: sys::cublasLtHandle_t,
    by_shape: HashMap<(Shape, bool), Plan>,
    /// Whether plans look for their fastest algorithm now.
    tuning: bool,
}

// SAFETY: a handle may be used from any thread; it lives behind a mutex.
unsafe impl Send for Plans {}

impl Drop for Plans {
    fn drop(&mut self) {
        for plan in self.by_shape.values() {
            // SAFETY: created by `plan`, used nowhere else.
            unsafe {
                let _ = result::destroy_matmul_desc(plan.desc);
                for layout in plan.layouts {
                    let _ = result::destroy_matrix_layout(layout);
                }
            }
        }
        // SAFETY: created by `new`; its plans are gone.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

impl Plans {
    /// A handle on the current device.
    pub(super) fn new() -> Result<Plans, CublasError> {
        Ok(Plans { handle: result::create_handle()?, by_shape: HashMap::new(), tuning: false })
    }

    /// The plan of a shape; a product that adds to its output has one of its own.
    fn plan(&mut self, shape: Shape, adds: bool) -> Result<&mut Plan, CublasError> {
        if !self.by_shape.contains_key(&(shape, adds)) {
            let plan = self.build(shape)?;
            self.by_shape.insert((shape, adds), plan);
        }
        Ok(self.by_shape.get_mut(&(shape, adds)).expect("inserted above"))
    }

    fn build(&self, shape: Shape) -> Result<Plan, CublasError> {
        let f32_type = sys::cudaDataType_t::CUDA_R_32F;
        let desc = result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, f32_type)?;
        let [a_transposed, b_transposed] = shape.transposed;
        let op = |transposed: bool| -> i32 { i32::from(transposed) };
        // The operands are swapped: ours second is theirs first.
        for (attribute, value) in [
            (sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA, op(b_transposed)),
            (sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSB, op(a_transposed)),
        ] {
            // SAFETY: the descriptor is alive and the attribute is an i32.
            unsafe {
                result::set_matmul_desc_attribute(desc, attribute, std::ptr::from_ref(&value).cast(), 4)?;
            }
        }
        // A row-major (rows, cols) matrix is a column-major (cols, rows) one.
        let layout = |dtype: Dtype, rows: usize, cols: usize, stride: usize| {
            result::create_matrix_layout(dtype.cuda(), cols as u64, rows as u64, stride as i64)
        };
        let (m, n, k) = (shape.m, shape.n, shape.k);
        let stored = |transposed: bool, rows: usize, cols: usize| {
            if transposed { (cols, rows) } else { (rows, cols) }
        };
        let (b_rows, b_cols) = stored(b_transposed, k, n);
        let (a_rows, a_cols) = stored(a_transposed, m, k);
        let layouts = [
            layout(shape.dtypes[1], b_rows, b_cols, shape.strides[1])?,
            layout(shape.dtypes[0], a_rows, a_cols, shape.strides[0])?,
            layout(shape.dtypes[2], m, n, shape.strides[2])?,
            layout(shape.dtypes[2], m, n, shape.strides[3])?,
        ];
        let preference = result::create_matmul_pref()?;
        let attributes = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let [a, b, c, d] = shape.alignments;
        // SAFETY: the preference is alive; the workspace limit is a u64, alignments are u32. The library writes at most
        // as many results as it is told that there is room for, and says how many.
        let algos = unsafe {
            use sys::cublasLtMatmulPreferenceAttributes_t as P;
            let limit = WORKSPACE as u64;
            result::set_matmul_pref_attribute(preference, attributes, std::ptr::from_ref(&limit).cast(), 8)?;
            // Parts of a sum that is split are added up in f32: nothing is rounded to bf16 but the whole.
            use sys::cublasLtReductionScheme_t as Scheme;
            let exact = match shape.dtypes[2] {
                Dtype::F32 => Scheme::CUBLASLT_REDUCTION_SCHEME_MASK,
                Dtype::Bf16 => Scheme::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE,
            } as u32;
            let schemes = P::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK;
            result::set_matmul_pref_attribute(preference, schemes, std::ptr::from_ref(&exact).cast(), 4)?;
            for (attribute, bytes) in [
                (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, b),
                (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, a),
                (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, c),
                (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, d),
            ] {
                let bytes = std::ptr::from_ref(&bytes).cast();
                result::set_matmul_pref_attribute(preference, attribute, bytes, 4)?;
            }
            let mut found =
                [const { MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::uninit() }; CANDIDATES];
            let mut count = 0;
            let status = sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                desc,
                layouts[0],
                layouts[1],
                layouts[2],
                layouts[3],
                preference,
                CANDIDATES as i32,
                found.as_mut_ptr().cast(),
                &raw mut count,
            );
            let _ = result::destroy_matmul_pref(preference);
            status.result()?;
            let found = found[..count as usize].iter().map(|found| found.assume_init_ref());
            let usable = found.filter(|found| found.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS);
            usable.map(|found| found.algo).collect::<Vec<Algo>>()
        };
        if algos.is_empty() {
            return Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED));
        }
        Ok(Plan { desc, layouts, algos })
    }
}

impl Cuda {
    /// c = alpha a b + beta c.
    ///
    /// Shapes: `c` (M, N), `a` (M, K), `b` (K, N), as they enter the product. `a` and `b` are bf16 or both f32;
    /// `c` is bf16 or f32. Precision: products and sums in f32 (no TF32), rounded once to the type of `c`.
    ///
    /// # Errors
    /// Shapes that do not belong together, or cuBLASLt refuses.
    pub fn gemm(
        &self,
        c: Matrix,
        a: impl Into<Operand>,
        b: impl Into<Operand>,
        alpha: f32,
        beta: f32,
    ) -> Result<()> {
        self.product(c, c, a.into(), b.into(), alpha, beta)
    }

    /// d = c + a b, with c and d of one type; else as [`Cuda::gemm`].
    ///
    /// # Errors
    /// Shapes or types that do not belong together, or cuBLASLt refuses.
    pub fn gemm_onto(
        &self,
        d: Matrix,
        c: Matrix,
        a: impl Into<Operand>,
        b: impl Into<Operand>,
    ) -> Result<()> {
        check(OP, "rows of d", c.rows, d.rows)?;
        check(OP, "columns of d", c.cols, d.cols)?;
        check(OP, "bytes of an element of d", c.dtype.size(), d.dtype.size())?;
        self.product(d, c, a.into(), b.into(), 1.0, 1.0)
    }

    /// d = alpha a b + beta c.
    fn product(&self, d: Matrix, c: Matrix, a: Operand, b: Operand, alpha: f32, beta: f32) -> Result<()> {
        let ((m, k), (b_k, n)) = (a.shape(), b.shape());
        check(OP, "rows of b", k, b_k)?;
        check(OP, "rows of c", m, c.rows)?;
        check(OP, "columns of c", n, c.cols)?;
        if m == 0 || n == 0 {
            return Ok(());
        }
        let in_place = c.ptr == d.ptr;
        if k == 0 && in_place {
            let size = c.dtype.size();
            return if beta == 0.0 { self.zero_rows(c.ptr, c.stride * size, n * size, m) } else { Ok(()) };
        }
        let workspace = self.scratch(Scratch::Gemm, WORKSPACE)?;
        self.bind()?;
        let shape = Shape {
            m,
            n,
            k,
            transposed: [a.transposed, b.transposed],
            strides: [a.matrix.stride, b.matrix.stride, c.stride, d.stride],
            dtypes: [a.matrix.dtype, b.matrix.dtype, c.dtype],
            alignments: [a.matrix.alignment(), b.matrix.alignment(), c.alignment(), d.alignment()],
        };
        let refuse = |e: CublasError| Error::Device {
            device: self.name(),
            reason: format!("cuBLASLt refuses {shape:?}: {e}"),
        };
        let mut plans = self.gemm.lock().unwrap_or_else(PoisonError::into_inner);
        // A sum over tokens may have zeros in long stretches, which would hide how it is split.
        let large = 2 * m * n * k >= tune::LEAST_OPERATIONS && !a.transposed;
        let (handle, tuning) = (plans.handle, plans.tuning && large);
        let plan = plans.plan(shape, beta != 0.0).map_err(refuse)?;
        let (desc, layouts) = (plan.desc, plan.layouts);
        let run = |algo: &Algo, beta: f32| {
            // SAFETY: the plan was made for these shapes, strides and alignments; the matrices are alive until the
            // stream has passed this point, because their buffers are freed by calls that wait for the device.
            unsafe {
                result::matmul(
                    handle,
                    desc,
                    std::ptr::from_ref(&alpha).cast(),
                    std::ptr::from_ref(&beta).cast(),
                    b.matrix.ptr as *const c_void,
                    layouts[0],
                    a.matrix.ptr as *const c_void,
                    layouts[1],
                    c.ptr as *const c_void,
                    layouts[2],
                    d.ptr as *mut c_void,
                    layouts[3],
                    algo,
                    workspace as *mut c_void,
                    WORKSPACE,
                    self.stream().cast(),
                )
            }
            .map_err(refuse)
        };
        if tuning && plan.algos.len() > 1 {
            plan.algos = vec![tune::fastest(self, d, (beta, in_place), workspace, &plan.algos, run)?];
        }
        let began = self.profile_begin()?;
        run(&plan.algos[0], beta)?;
        drop(plans);
        self.profile_end(if m.min(n).min(k) <= LOW_RANK { "gemm_low_rank" } else { OP }, began)
    }

    /// Runs `enqueue`; its large products look for their fastest algorithms on the way, which takes a second or two
    /// in all and waits for the device.
    ///
    /// # Errors
    /// `enqueue` fails.
    pub fn tuning<E>(&self, enqueue: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let set = |on: bool| self.gemm.lock().unwrap_or_else(PoisonError::into_inner).tuning = on;
        set(true);
        let done = enqueue();
        set(false);
        done
    }
}
