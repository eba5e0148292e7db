//! Where a run starts: the base that its adapter goes on, and the adapter's first values.
//!
//! A new adapter is initialized on the base; a saved one brings its own base along; PiSSA splits the base
//! first, once, and every later start finds that split.

use qpeft_formats::peft::{InitLoraWeights, PeftAdapter, PeftConfig};
use qpeft_kernels::Device;
use qpeft_kernels::svd::SvdOptions;
use qpeft_kernels::weight::WeightType;

use super::checkpoint;
use super::config::TrainConfig;
use super::error::Result;
use super::fit::Fit;
use super::trainer::Observer;
use crate::adapters::pissa::{SplitError, SplitOptions};
use crate::adapters::staged::{self, FileId, Manifest, Settings};
use crate::adapters::{self, AdapterFolder, folder};
use crate::model::base::Quantizing;
use crate::model::layer::Slot;
use crate::model::load::module_path;
use crate::model::{Base, Decoder, Parameters, residual};

/// Stream of the random numbers of the split; linears use the numbers below `1 << 20` of their own.
const SVD_STREAM: u64 = 1 << 40;

/// What an adapter is put on, and how it starts.
pub(super) struct Start<'a> {
    /// The settings.
    pub config: &'a TrainConfig,
    /// Where the decoder lives.
    pub device: &'a Device,
    /// The base that the user names.
    pub model: Base,
    /// The saved adapter to start from.
    pub init: Option<&'a AdapterFolder>,
    /// Whether a run is continued, whose files are then not written again.
    pub resume: bool,
}

impl Start<'_> {
    /// Refuses a split that could not be stored, before anything expensive is done.
    pub fn check(&self) -> Result<()> {
        if self.config.method.info().staged {
            let peft = self.peft_config();
            let targets = self.targets(&peft)?;
            residual::check(&self.model, &targets, self.residual_type())?;
            self.check_ranks(&peft, &targets)?;
        }
        Ok(())
    }

    /// Refuses more singular directions than a target has.
    fn check_ranks(&self, peft: &PeftConfig, targets: &[String]) -> Result<()> {
        let config = self.model.config()?;
        for module in targets {
            let Some(slot) = Slot::ALL.iter().find(|slot| module.ends_with(slot.module())) else { continue };
            let (rows, cols) = slot.shape(&config);
            let (rank, most) = (peft.rank_of(module)?, rows.min(cols));
            if rank > most {
                let error = crate::Error::refused(format!(
                    "`--lora-r {rank}`: `{module}` is {rows} x {cols} and has {most} singular directions"
                ));
                return Err(error.with_hint(format!("give a rank of {most} or less")).into());
            }
        }
        Ok(())
    }

    /// The type of the residuals: that of the split which a saved adapter brings along, or the asked one.
    pub fn residual_type(&self) -> Option<WeightType> {
        match self.init.and_then(|folder| folder.manifest.as_ref()) {
            Some(manifest) => manifest.settings.residual_type,
            None => self.config.residual_quant,
        }
    }

    /// The decoder on the right base with initial adapter values.
    pub fn adapt(
        self,
        fit: Option<&Fit>,
        observer: &mut dyn Observer,
    ) -> Result<(Decoder, Parameters, PeftConfig, Option<Manifest>, Base)> {
        let peft = self.peft_config();
        if self.config.method.info().staged {
            return self.adapt_staged(peft, fit, observer);
        }
        let base = match self.init {
            Some(folder) => {
                check_kind(&folder.adapter.config, false, has_magnitude(self.config))?;
                folder.resolve(self.model)?
            }
            None => self.model,
        };
        let mut decoder = load(&base, self.device, fit)?;
        let mut params = adapters::attach(&mut decoder, &peft)?;
        match self.init {
            Some(folder) => adapters::load(&mut params, &folder.adapter)?,
            None => adapters::initialize(&mut decoder, &mut params, self.config.seed)?,
        }
        Ok((decoder, params, peft, None, base))
    }

    /// PiSSA: split the base unless this run has done so, then train on what is left of it.
    fn adapt_staged(
        self,
        peft: PeftConfig,
        fit: Option<&Fit>,
        observer: &mut dyn Observer,
    ) -> Result<(Decoder, Parameters, PeftConfig, Option<Manifest>, Base)> {
        let run = &self.config.output;
        // Trained further: the residual and the factors of that run are this run's.
        let continued = self.init.filter(|folder| folder.manifest.is_some());
        let given = self.init.filter(|folder| folder.manifest.is_none()).map(|folder| &folder.adapter);
        let base_id = FileId::of(&self.model)?;
        if let Some((folder, manifest)) =
            continued.and_then(|folder| Some((folder, folder.manifest.as_ref()?)))
        {
            check_kind(&folder.adapter.config, true, self.config.use_dora)?;
            folder.check_base(self.model.path(), &base_id, &[&manifest.base])?;
            if !self.resume {
                checkpoint::clear_run(run)?;
                staged::copy(&folder.run, run)?;
            }
        } else if let Some(given) = given {
            // Factors to split off: a plain pair. Magnitudes follow from it; a trained pair without its
            // residual does not say what was split off.
            check_kind(&given.config, false, false)?;
        }
        let mut decoder = {
            let quantizing = Quantizing::of(&self.model, self.device)?;
            Decoder::load_quantizing(&self.model, &Device::Cpu, false, &quantizing)?
        };
        let settings = self.settings(&peft, given)?;
        let manifest = match Manifest::read(run)? {
            Some(manifest) if continued.is_some() || self.resume => manifest,
            Some(manifest) if manifest.base == base_id && manifest.settings == settings => manifest,
            None if self.resume => {
                return Err(crate::Error::refused(format!(
                    "`{}` has no staged init (`init/manifest.json`), which the checkpoint was trained on",
                    run.display()
                ))
                .with_hint("restore the run's `init` folder; the residual cannot be recomputed")
                .into());
            }
            _ => {
                let options = SplitOptions {
                    svd: SvdOptions {
                        iterations: self.config.pissa_niter,
                        seed: self.config.seed ^ SVD_STREAM,
                        ..SvdOptions::default()
                    },
                    refinements: self.config.pissa_refinements,
                };
                let (factors, errors) = adapters::split_targets(
                    &mut decoder,
                    &peft,
                    given,
                    settings.residual_type,
                    &options,
                    self.device,
                    |done, total| {
                        observer.phase("split (PiSSA)", done, total);
                    },
                )?;
                if let Some(cuda) = self.device.cuda() {
                    // The model comes into this memory.
                    cuda.release();
                }
                let mut total = SplitError::default();
                for (_, error) in &errors {
                    total += *error;
                }
                if given.is_some() && total.captured() <= 0.0 {
                    observer.warn("the factors of `--init-adapter` hold nothing of the base: they are taken out of it as they are, so that the run starts from the base alone, without what they had learned");
                }
                // The adapter of a former run fits only the residual that is about to go.
                checkpoint::clear_run(run)?;
                staged::write(run, &self.model, &decoder, &factors, settings, &errors)?
            }
        };
        let base = manifest.open_residual(run)?;
        let mut decoder = load(&base, self.device, fit)?;
        let mut params = adapters::attach(&mut decoder, &peft)?;
        if let Some(folder) = continued {
            adapters::load(&mut params, &folder.adapter)?;
        } else {
            let factors = PeftAdapter::read(&staged::initial_adapter(run))?;
            adapters::load_factors(&mut decoder, &mut params, &factors)?;
        }
        Ok((decoder, params, peft, Some(manifest), base))
    }

    /// Paths of the targets, in model order.
    fn targets(&self, peft: &PeftConfig) -> Result<Vec<String>> {
        let mut targets = Vec::new();
        for layer in 0..self.model.config()?.n_layers {
            for module in Slot::ALL.map(|slot| module_path(layer, slot)) {
                if peft.targets(&module)? {
                    targets.push(module);
                }
            }
        }
        Ok(targets)
    }

    fn settings(&self, peft: &PeftConfig, given: Option<&PeftAdapter>) -> Result<Settings> {
        Ok(Settings {
            rank: peft.r,
            scaling: peft.scaling("")?,
            iterations: given.is_none().then_some(self.config.pissa_niter),
            refinements: self.config.pissa_refinements,
            seed: self.config.seed,
            factors: given.map(staged::hash_of),
            device: self.device.cuda().map(|_| "cuda".to_owned()),
            residual_type: self.residual_type(),
            targets: self.targets(peft)?,
        })
    }

    /// The adapter's configuration: that of the saved adapter, or the one that the flags describe.
    pub fn peft_config(&self) -> PeftConfig {
        let config = self.config;
        let mut peft = if let Some(folder) = self.init {
            folder.adapter.config.clone()
        } else {
            let mut peft = PeftConfig::new(config.lora_r, config.lora_alpha);
            peft.use_rslora = config.use_rslora;
            peft.use_dora = has_magnitude(config);
            peft.target_modules = Some((&config.target_modules).into());
            peft
        };
        if config.method.info().staged {
            peft.use_dora = config.use_dora;
            peft.init_lora_weights = InitLoraWeights::Named(config.method.name().to_owned());
        }
        peft.lora_dropout = config.lora_dropout;
        peft.base_model_name_or_path = Some(self.model.name());
        peft
    }
}

/// The decoder with everything where `fit` wants it.
fn load(base: &Base, device: &Device, fit: Option<&Fit>) -> Result<Decoder> {
    let Some(Fit { settings, need, .. }) = fit else { return Ok(Decoder::load(base, device)?) };
    if let Some(cuda) = device.cuda() {
        need.reserve(cuda)?;
    }
    Ok(Decoder::load_placed(base, device, settings.embedding_on_host)?)
}

/// Whether the method of a run trains a magnitude per row.
fn has_magnitude(config: &TrainConfig) -> bool {
    config.use_dora || config.method.info().magnitude
}

/// Refuses to train an adapter further as one of another kind.
fn check_kind(saved: &PeftConfig, pissa: bool, use_dora: bool) -> Result<()> {
    let (kind, method) = match (folder::is_pissa(saved), saved.use_dora) {
        (true, false) => ("PiSSA", "pissa"),
        (true, true) => ("PiSSA + DoRA", "pissa --use-dora"),
        (false, true) => ("DoRA", "dora"),
        (false, false) => ("LoRA", "lora"),
    };
    if folder::is_pissa(saved) == pissa && saved.use_dora == use_dora {
        return Ok(());
    }
    let error = crate::Error::refused(format!(
        "`--init-adapter`: the adapter is a {kind} adapter, which `--method` does not name"
    ));
    Err(error.with_hint(format!("train it further with `--method {method}`")).into())
}
