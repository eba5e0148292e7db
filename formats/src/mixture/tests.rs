//! Every choice against llama.cpp's snapshots of twelve models, and the user's exceptions.

use std::path::{Path, PathBuf};

use super::*;

/// A model of `testdata/mixtures`: facts, quantized tensors, and their types for every file type.
struct Snapshot {
    facts: ModelFacts,
    tensors: Vec<TensorDecl>,
    sections: Vec<Section>,
}

/// One file type: what most tensors get, and the others.
struct Section {
    file_type: FileType,
    default: GgmlType,
    listed: Vec<(String, GgmlType)>,
}

fn dtype(name: &str) -> GgmlType {
    GgmlType::from_name(name).unwrap_or_else(|| panic!("{name}"))
}

/// `blk.0.attn_q.weight` to `blk.2.attn_q.weight` of `attn_q.weight` and `0-2`.
fn names(role: &str, layers: &str) -> Vec<String> {
    if layers == "-" {
        return vec![role.to_owned()];
    }
    let mut names = Vec::new();
    for range in layers.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        for layer in first.parse::<u32>().unwrap()..=last.parse().unwrap() {
            names.push(format!("blk.{layer}.{role}"));
        }
    }
    names
}

fn read(path: &Path) -> Snapshot {
    let text = std::fs::read_to_string(path).unwrap();
    let mut facts = None;
    let (mut tensors, mut sections) = (Vec::new(), Vec::<Section>::new());
    for line in text.lines() {
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["model", arch, "layers", layers, "heads", heads, "kv-heads", kv_heads, "experts", experts] => {
                let [layers, heads, kv_heads, experts] =
                    [layers, heads, kv_heads, experts].map(|n| n.parse().unwrap());
                facts = Some(ModelFacts::new(arch, layers, heads, kv_heads, experts));
            }
            ["tensor", role, row_len, matrices, layers] => {
                let shape = vec![row_len.parse().unwrap(), 256, matrices.parse().unwrap()];
                tensors.extend(names(role, layers).into_iter().map(|name| TensorDecl {
                    name,
                    shape: shape.clone(),
                    dtype: GgmlType::F32,
                }));
            }
            ["file-type", name, default] => {
                let file_type = FileType::from_name(name).unwrap();
                sections.push(Section { file_type, default: dtype(default), listed: Vec::new() });
            }
            [role, chosen, layers] => {
                let listed = &mut sections.last_mut().unwrap().listed;
                listed.extend(names(role, layers).into_iter().map(|name| (name, dtype(chosen))));
            }
            _ => panic!("{line}"),
        }
    }
    Snapshot { facts: facts.unwrap(), tensors, sections }
}

fn snapshots() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/mixtures");
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    paths.sort();
    paths
}

#[test]
fn every_type_of_twelve_models_is_the_one_that_llama_cpp_chooses() {
    let (mut compared, mut wrong) = (0, Vec::new());
    for path in snapshots() {
        let model = path.file_stem().unwrap().to_str().unwrap();
        let snapshot = read(&path);
        for Section { file_type, default, listed } in &snapshot.sections {
            assert_eq!(file_type.default_type(), *default, "{file_type}");
            let choices = Mixture::new(*file_type).choose(&snapshot.facts, &snapshot.tensors, false).unwrap();
            for (tensor, choice) in snapshot.tensors.iter().zip(choices) {
                let listed = listed.iter().find(|(name, _)| *name == tensor.name);
                let expected = listed.map_or(*default, |(_, dtype)| *dtype);
                compared += 1;
                if choice.dtype != expected {
                    wrong.push(format!(
                        "{model} {file_type} {}: {}, expected {expected}",
                        tensor.name, choice.dtype
                    ));
                }
            }
            let known = listed.iter().filter(|(name, _)| snapshot.tensors.iter().any(|t| t.name == *name));
            assert_eq!(known.count(), listed.len(), "{model} {file_type} lists tensors without a row length");
        }
    }
    assert!(wrong.is_empty(), "{} of {compared}:\n{}", wrong.len(), wrong[..wrong.len().min(40)].join("\n"));
    assert_eq!(compared, COMPARED);
}

/// All of them: nothing falls out of the comparison unseen.
const COMPARED: usize = 162_921;

fn small() -> (ModelFacts, Vec<TensorDecl>) {
    let decl = |name: &str, shape: &[u64]| TensorDecl {
        name: name.to_owned(),
        shape: shape.to_vec(),
        dtype: GgmlType::F16,
    };
    let tensors = vec![
        decl("token_embd.weight", &[256, 1000]),
        decl("output.weight", &[256, 1000]),
        decl("output_norm.weight", &[256]),
        decl("blk.0.attn_q.weight", &[256, 256]),
        decl("blk.0.attn_k.weight", &[256, 1]),
        decl("blk.0.ffn_gate_inp.weight", &[256, 8]),
        decl("blk.0.ffn_down.weight", &[96, 256]),
        decl("blk.0.ffn_up.weight", &[90, 256]),
        decl("blk.0.ssm_conv1d.weight", &[4, 256]),
    ];
    (ModelFacts::new("llama", 8, 4, 4, 0), tensors)
}

fn types(mixture: &Mixture) -> Vec<&'static str> {
    let (facts, tensors) = small();
    mixture.choose(&facts, &tensors, false).unwrap().into_iter().map(|c| c.dtype.name()).collect()
}

#[test]
fn rows_that_do_not_divide_get_smaller_blocks_or_f16_and_small_tensors_stay() {
    assert_eq!(
        types(&Mixture::new(FileType::Q4_K_S)),
        ["Q4_K", "Q6_K", "F16", "Q4_K", "F16", "F16", "Q5_1", "F16", "F16"]
    );
    assert_eq!(types(&Mixture::new(FileType::F32))[..4], ["F32", "F32", "F16", "F32"]);
}

#[test]
fn what_the_user_asks_for_goes_before_the_rules() {
    let mixture = Mixture {
        overrides: vec![
            TypeOverride::new("BLK\\.\\d+\\.attn", GgmlType::Q8_0).unwrap(),
            TypeOverride::new("attn_q", GgmlType::Q4_0).unwrap(),
        ],
        ..Mixture::new(FileType::Q4_K_M)
    };
    assert_eq!(types(&mixture)[3..5], ["Q8_0", "F16"]);
    let mixture = Mixture { pure: true, ..mixture };
    assert_eq!(types(&mixture)[..4], ["Q4_K", "Q4_K", "F16", "Q8_0"]);
    let mixture = Mixture {
        leave_output: true,
        embedding_type: Some(GgmlType::Q5_0),
        output_type: Some(GgmlType::Q5_1),
        ..Mixture::new(FileType::Q4_K_M)
    };
    assert_eq!(types(&mixture)[..2], ["Q5_0", "F16"]);
    let mixture = Mixture { leave_output: false, ..mixture };
    assert_eq!(types(&mixture)[..2], ["Q5_0", "Q5_1"]);
}

#[test]
fn a_tied_embedding_is_the_head() {
    let (facts, mut tensors) = small();
    tensors.remove(1);
    let of = |mixture: &Mixture| mixture.choose(&facts, &tensors, false).unwrap()[0].dtype;
    let mut mixture = Mixture::new(FileType::Q4_0);
    assert_eq!(of(&mixture), GgmlType::Q6_K);
    mixture.output_type = Some(GgmlType::Q5_1);
    assert_eq!(of(&mixture), GgmlType::Q5_1);
    mixture.embedding_type = Some(GgmlType::Q5_0);
    assert_eq!(of(&mixture), GgmlType::Q5_0);
}

#[test]
fn importance_changes_the_rules_and_is_demanded_where_the_bits_are_few() {
    let (facts, tensors) = small();
    let of = |file_type, has_importance| {
        let choices = Mixture::new(file_type).choose(&facts, &tensors, has_importance).unwrap();
        choices.into_iter().map(|c| (c.dtype.name(), c.requires_importance)).collect::<Vec<_>>()
    };
    assert_eq!(of(FileType::Q4_0, false)[6], ("Q4_0", false));
    assert_eq!(of(FileType::Q4_0, true)[6], ("Q4_1", false));
    assert_eq!(of(FileType::IQ2_XXS, true)[3], ("IQ2_XXS", true));
    assert_eq!(of(FileType::IQ2_XXS, true)[0], ("Q2_K", false));
    assert_eq!(of(FileType::Q2_K_S, true)[3], ("Q2_K", true));
    assert_eq!(of(FileType::Q2_K, true)[3], ("Q2_K", false));
}

#[test]
fn what_cannot_be_chosen_is_refused_with_the_tensor() {
    let (facts, tensors) = small();
    let refused = |mixture: &Mixture, facts: &ModelFacts| {
        mixture.choose(facts, &tensors, false).unwrap_err().to_string()
    };
    assert_eq!(
        refused(&Mixture::new(FileType::Q1_0), &facts),
        "tensor `blk.0.ffn_down.weight`: row length 96 is not a multiple of the Q1_0 block length 128"
    );
    let embedding = Mixture { embedding_type: Some(GgmlType::Q4_K), ..Mixture::new(FileType::Q8_0) };
    let mut odd = tensors.clone();
    odd[0].shape[0] = 96;
    assert_eq!(
        embedding.choose(&facts, &odd, false).unwrap_err().to_string(),
        "tensor `token_embd.weight`: row length 96 is not a multiple of the Q4_K block length 256"
    );
    let few = ModelFacts::new("llama", 0, 4, 4, 8);
    assert_eq!(
        refused(&Mixture::new(FileType::Q4_0), &few),
        "tensor `blk.0.ffn_down.weight`: does not lie in one of the 0 layers, as `blk.N.` in its name should say"
    );
    let error = TypeOverride::new("(", GgmlType::Q8_0).unwrap_err().to_string();
    assert!(error.starts_with("pattern `(` is not usable: "), "{error}");
}

#[test]
fn names_and_numbers_are_found_and_aliases_too() {
    for file_type in FileType::ALL {
        assert_eq!(FileType::from_id(file_type.id()), Some(file_type));
        assert_eq!(FileType::from_name(&file_type.name().to_lowercase()), Some(file_type));
    }
    assert_eq!(FileType::from_name("q4-k"), Some(FileType::Q4_K_M));
    assert_eq!(FileType::from_name("q4_k_x"), None);
    assert_eq!(FileType::from_id(4), None);
}

#[test]
fn tensors_are_ordered_by_layer_and_name() {
    let names = ["blk.10.a", "blk.2.b", "token_embd.weight", "blk.2.a", "output.weight", "blkx"];
    let tensors: Vec<_> = names
        .iter()
        .map(|name| TensorDecl { name: (*name).to_owned(), shape: vec![1], dtype: GgmlType::F32 })
        .collect();
    let ordered: Vec<_> = file_order(&tensors).into_iter().map(|i| names[i]).collect();
    assert_eq!(ordered, ["blkx", "output.weight", "token_embd.weight", "blk.2.a", "blk.2.b", "blk.10.a"]);
}
