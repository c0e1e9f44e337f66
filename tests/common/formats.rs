//! Random models in every format their like ships in: what a file is to mean, the file, and whether
//! the one gives what the other does. The writers here are the tests' own, but for the cases that
//! go through `sterna::convert`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value as Json, json};
use sterna::backend::{Output, Want};
use sterna::config::{Activation, Activations, Architecture, ModelConfig, RopeScaling, WeightForm};
use sterna::convert::{write_gguf, write_hf};
use sterna::format::float::{Float, bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use sterna::format::ggml::{FloatType, GgmlType, TernaryType, i2s_tail};
use sterna::format::gguf::{Array, Strings, TensorPlan, Value, Writer};
use sterna::random::Random;
use sterna::synthetic::{SyntheticModel, tiny_bitnet, tiny_bonsai, tiny_llama, tiny_normed};
use sterna::tensor_names::{
    DOWN_PROJ, GATE_PROJ, K_PROJ, LINEARS, Linear, Naming, O_PROJ, Q_PROJ, UP_PROJ, V_PROJ, norms,
};
use sterna::weights::{
    Alphabet, Input, LayerWeights, Rotation, Table, TableData, TernaryMatrix, WeightScale,
    WeightSource,
};
use sterna::{Checkpoint, Device, I2sLayout, OpenOptions, Transformer};

/// A model in a format.
pub struct Case {
    /// What it is shaped like.
    pub like: &'static str,
    pub config: ModelConfig,
    /// Whether, and how, its weights are stored rotated.
    pub rotation: Option<Signs>,
    pub form: Form,
}

/// Signs of a Hadamard rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signs {
    /// All +1.
    Identity,
    /// Random.
    Explicit,
}

/// A file format, as its writers use it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Safetensors of master weights.
    Master(Float),
    /// Packed safetensors whose scale divides.
    PackedDivide,
    /// Packed safetensors by `sterna::convert`, whose scale multiplies.
    WriteHf,
    /// MLX packs of the configuration's bits and group.
    Mlx,
    /// GGUF by `sterna::convert`.
    WriteGguf(GgmlType),
    /// GGUF by the writer here.
    Gguf(Gguf),
}

/// A GGUF file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gguf {
    /// `general.architecture`.
    pub arch: &'static str,
    pub linears: Linears,
    /// Type of embedding table and LM head; `None`: as linear layers.
    pub tables: Option<GgmlType>,
    /// Files.
    pub parts: usize,
}

/// How linear layers stand in a GGUF file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Linears {
    Ternary(GgmlType),
    /// I2_S in blocks of 64.
    Arm64,
    /// I2_S of half the scale, with a `.scale` of 2 beside it.
    Scaled,
    /// Floats of three values.
    Float(Float),
}

/// Prompt of every case.
const PROMPT: [u32; 9] = [7, 300, 41, 5, 123, 88, 250, 9, 199];

/// Greedy tokens of every case.
const TOKENS: usize = 24;

/// Values a block of the rotations.
const ROTATION_BLOCK: usize = 128;

const SEED: u64 = 20;

fn two_layers(config: ModelConfig) -> ModelConfig {
    ModelConfig { num_hidden_layers: 2, max_position_embeddings: 512, ..config }
}

/// Dimensions for blocks of 256.
fn bitnet() -> ModelConfig {
    two_layers(ModelConfig {
        hidden_size: 256,
        intermediate_size: 512,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 64,
        ..tiny_bitnet()
    })
}

/// As bitnet_b1_58-large and -3B: SiLU, every head its own key, `head_dim` of 96 or 100.
fn bitnet_1bitllm(hidden_size: usize, head_dim: usize, intermediate_size: usize) -> ModelConfig {
    let heads = hidden_size / head_dim;
    ModelConfig {
        architecture: Architecture::Bitnet1bitLlm,
        weight_form: WeightForm::Online,
        hidden_act: Activation::Silu,
        hidden_size,
        intermediate_size,
        num_attention_heads: heads,
        num_key_value_heads: heads,
        head_dim,
        rope_theta: 10_000.0,
        ..bitnet()
    }
}

/// As Llama3-8B-1.58.
fn llama() -> ModelConfig {
    ModelConfig { rope_theta: 500_000.0, ..two_layers(ternary_llama(256, 512, (4, 2), 64)) }
}

fn ternary_llama(
    hidden_size: usize,
    intermediate_size: usize,
    (num_attention_heads, num_key_value_heads): (usize, usize),
    head_dim: usize,
) -> ModelConfig {
    two_layers(ModelConfig {
        hidden_size,
        intermediate_size,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        ..tiny_llama()
    })
}

/// As Falcon3-1.58: wide heads.
fn falcon3() -> ModelConfig {
    let config = ternary_llama(512, 768, (2, 1), 256);
    ModelConfig { rms_norm_eps: 1e-6, rope_theta: 1_000_042.0, ..config }
}

/// As Falcon-E: eight query heads for a key.
fn falcon_e() -> ModelConfig {
    ternary_llama(256, 1024, (8, 1), 32)
}

/// As Bonsai: `head_dim` on its own, YaRN.
fn bonsai(bits: usize, group: usize, heads: usize, is_tied: bool) -> ModelConfig {
    two_layers(ModelConfig {
        num_attention_heads: heads,
        num_key_value_heads: 2,
        tie_word_embeddings: is_tied,
        ..tiny_bonsai(bits, group)
    })
}

/// As bitnet-embedding-0.6b, in whole blocks.
fn normed() -> ModelConfig {
    two_layers(ModelConfig {
        hidden_size: 256,
        intermediate_size: 384,
        num_attention_heads: 6,
        num_key_value_heads: 2,
        head_dim: 64,
        rms_norm_eps: 1e-6,
        ..tiny_normed()
    })
}

/// Every architecture in every format it ships in.
pub fn cases() -> Vec<Case> {
    use GgmlType::{Bf16, F16, F32, I2S, Pq2_0, Ptq1_0, Q1_0, Q2_0, Q2_0G128, Q4_0, Q8_0, Tq1_0};
    use GgmlType::{Q4K, Q6K, Tq2_0};
    use Linears::{Arm64, Scaled, Ternary};

    let mut cases = Vec::new();
    let mut add = |like, config: &ModelConfig, form| {
        cases.push(Case { like, config: config.clone(), rotation: None, form });
    };
    let gguf = |arch, linears, tables| Form::Gguf(Gguf { arch, linears, tables, parts: 1 });
    let split = |arch, ty, tables| {
        Form::Gguf(Gguf { arch, linears: Ternary(ty), tables: Some(tables), parts: 3 })
    };

    let config = bitnet();
    for float in [Float::Bf16, Float::F16, Float::F32] {
        add("2B4T", &config, Form::Master(float));
        add("2B4T", &config, gguf("bitnet-b1.58", Linears::Float(float), Some(F16)));
    }
    add("2B4T", &config, Form::WriteHf);
    for ty in [I2S, Tq1_0, Tq2_0, Q2_0, Pq2_0, Ptq1_0] {
        add("2B4T", &config, Form::WriteGguf(ty));
    }
    for ty in [I2S, Tq1_0, Tq2_0, Q2_0, Q2_0G128, Pq2_0, Ptq1_0] {
        add("2B4T", &config, gguf("bitnet-25", Ternary(ty), Some(Bf16)));
    }
    for ty in [F32, F16, Bf16, Q8_0, Q6K, Q4_0, Q4K] {
        add("2B4T", &config, gguf("bitnet-b1.58", Ternary(I2S), Some(ty)));
    }
    add("2B4T", &config, gguf("bitnet-b1.58", Arm64, Some(F16)));
    add("2B4T", &config, gguf("bitnet", Scaled, Some(F16)));
    add("2B4T", &config, split("bitnet-b1.58", I2S, F16));
    // No multiple of anything.
    let config = ModelConfig { intermediate_size: 341, ..two_layers(tiny_bitnet()) };
    add("2B4T, odd", &config, Form::WriteHf);
    add("2B4T, odd", &config, Form::Master(Float::Bf16));

    for (hidden, head_dim, intermediate) in [(384, 96, 512), (200, 100, 341)] {
        let config = bitnet_1bitllm(hidden, head_dim, intermediate);
        add("1bitLLM", &config, Form::Master(Float::F32));
        add("1bitLLM", &config, Form::Master(Float::F16));
        add("1bitLLM", &config, Form::WriteHf);
        add("1bitLLM", &config, gguf("bitnet", Linears::Float(Float::F32), Some(F16)));
    }
    let config = bitnet_1bitllm(384, 96, 512);
    add("1bitLLM", &config, gguf("bitnet", Ternary(I2S), Some(F16)));
    add("1bitLLM", &config, gguf("bitnet", Ternary(Pq2_0), Some(F32)));
    add("1bitLLM", &config, Form::WriteGguf(I2S));

    for (like, config) in
        [("Llama3-1.58", llama()), ("Falcon3", falcon3()), ("Falcon-E", falcon_e())]
    {
        add(like, &config, Form::PackedDivide);
        add(like, &config, Form::WriteHf);
        add(like, &config, Form::WriteGguf(I2S));
        add(like, &config, gguf("llama", Ternary(I2S), Some(F16)));
        add(like, &config, gguf("llama", Ternary(Tq1_0), Some(Q6K)));
        add(like, &config, gguf("llama", Ternary(Tq2_0), Some(F32)));
    }
    let config = llama();
    add("Llama3-1.58", &config, gguf("llama", Linears::Float(Float::F32), Some(Q8_0)));
    add("Llama3-1.58", &config, gguf("llama", Ternary(Q2_0), Some(Q4_0)));
    add("Llama3-1.58", &config, gguf("llama", Arm64, Some(Q4K)));
    add("Llama3-1.58", &config, split("llama", I2S, F16));
    let rope_scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 64.0,
    };
    let config = ModelConfig { rope_scaling, ..llama() };
    add("Llama 3.1", &config, Form::PackedDivide);
    add("Llama 3.1", &config, Form::WriteHf);
    add("Llama 3.1", &config, Form::WriteGguf(I2S));
    let config = ModelConfig { rope_scaling: RopeScaling::Linear { factor: 2.0 }, ..llama() };
    add("Llama, linear", &config, Form::PackedDivide);
    add("Llama, linear", &config, gguf("llama", Ternary(I2S), Some(F16)));

    for (like, heads, is_tied) in
        [("Bonsai-1.7B", 2, true), ("Bonsai-4B", 6, true), ("Bonsai-8B", 4, false)]
    {
        let binary = bonsai(1, 128, heads, is_tied);
        let ternary = bonsai(2, 128, heads, is_tied);
        add(like, &binary, Form::Mlx);
        add(like, &binary, gguf("qwen3", Ternary(Q1_0), None));
        add(like, &ternary, Form::Mlx);
        for ty in [Q2_0, Q2_0G128, Pq2_0, Ptq1_0] {
            add(like, &ternary, gguf("qwen3", Ternary(ty), None));
        }
    }
    let config = bonsai(1, 128, 4, false);
    add("Bonsai-8B", &config, Form::WriteGguf(Q1_0));
    add("Bonsai-8B", &config, gguf("qwen3", Ternary(Q1_0), Some(Q8_0)));
    add("Bonsai-8B", &config, gguf("qwen3", Ternary(Q1_0), Some(F16)));
    let config = bonsai(2, 64, 4, false);
    add("Bonsai-8B, 64", &config, Form::Mlx);
    add("Bonsai-8B, 64", &config, Form::WriteGguf(Q2_0));
    add("Bonsai-8B, 64", &config, gguf("qwen3", Ternary(Q2_0), Some(Q4K)));

    add("bitnet-embedding", &normed(), Form::WriteHf);
    add("bitnet-embedding", &normed(), Form::WriteGguf(I2S));
    add("bitnet-embedding", &normed(), gguf("qwen3", Ternary(I2S), Some(F16)));

    for (like, is_tied, signs, ty, tables) in [
        ("Bonsai 2", true, Signs::Explicit, Pq2_0, None),
        ("Bonsai 2", false, Signs::Explicit, Ptq1_0, Some(F16)),
        ("Bonsai 2", true, Signs::Identity, Ptq1_0, Some(Q8_0)),
        ("Bonsai 2", false, Signs::Identity, Pq2_0, None),
    ] {
        let config = bonsai(2, 128, 4, is_tied);
        let form = gguf("qwen3", Ternary(ty), tables);
        cases.push(Case { like, config, rotation: Some(signs), form });
    }
    cases
}

impl Case {
    pub fn name(&self) -> String {
        let rotation = self.rotation.map_or(String::new(), |signs| format!(", rotated, {signs:?}"));
        let rows = self.config.hidden_size;
        format!("{} ({rows} wide{rotation}) as {:?}", self.like, self.form)
    }

    /// Whether embedding and head are int8 codes with scales.
    pub fn has_code_table(&self) -> bool {
        let float = self.table_type().and_then(GgmlType::float);
        float.is_some_and(|float| float.plain().is_none())
    }

    fn table_type(&self) -> Option<GgmlType> {
        match self.form {
            Form::Gguf(gguf) => gguf.tables,
            _ => None,
        }
    }

    /// Whether the file holds exactly what the model is; what it rounds is a scale to an IEEE half,
    /// or a rotary frequency to a factor.
    pub fn is_exact(&self) -> bool {
        let has_tensor_scales = self.config.activations == Activations::Int8Token;
        let ty = match self.form {
            Form::WriteGguf(ty) | Form::Gguf(Gguf { linears: Linears::Ternary(ty), .. }) => ty,
            _ => return true,
        };
        // The scale that divides has no reciprocal of few bits.
        let rounds = has_tensor_scales
            && ty != GgmlType::I2S
            && self.config.weight_form == WeightForm::PackedDivide;
        !rounds && !matches!(self.config.rope_scaling, RopeScaling::Llama3 { .. })
    }

    /// The model that the file stands for.
    pub fn model(&self) -> Changed {
        let mut model = Changed::new(SyntheticModel::new(self.config.clone(), SEED));
        if let Some(signs) = self.rotation {
            model.rotation = Some((signs, ROTATION_BLOCK));
        }
        if let Some(ty) = self.table_type() {
            model.table = Box::new(move |seed, table| table_of(ty, seed, table).1);
        }
        if let Form::Master(float) = self.form {
            model.matrix = Box::new(move |_, matrix| {
                let (trits, shape) = (all_trits(&matrix), matrix.shape());
                let nonzero = trits.iter().filter(|&&trit| trit != 0).count() as f64;
                let weight = f64::from(master_weight(tensor_scale(&matrix), float));
                // The sum of so few bits is exact in any order.
                let absmean = (weight * nonzero / shape.len() as f64) as f32;
                let input = matrix.input().clone();
                TernaryMatrix::from_trits(shape, trits, absmean).with_input(input)
            });
        }
        model
    }

    /// Writes it into an empty directory and opens it.
    pub fn write(&self, directory: &Path) -> Checkpoint {
        self.write_model(&self.model(), directory)
    }

    /// Writes another model of this configuration in its form.
    pub fn write_model(&self, model: &dyn WeightSource, directory: &Path) -> Checkpoint {
        let path = match self.form {
            Form::Master(_) | Form::PackedDivide | Form::Mlx => {
                HfFiles::of(model, self.form).write(directory);
                directory.to_owned()
            }
            Form::WriteHf => {
                write_hf(model, directory, &mut |_, _| {}).expect("the model fits the form");
                directory.to_owned()
            }
            Form::WriteGguf(ty) => {
                let path = directory.join("model.gguf");
                let file = fs::File::create_new(&path).expect("a writable directory");
                write_gguf(model, "test", None, ty, (&path, file), &mut |_, _| {})
                    .expect("the model fits the type");
                path
            }
            Form::Gguf(gguf) => GgufFile::of(model, gguf).write(directory),
        };
        let i2s_layout = match self.form {
            Form::Gguf(Gguf { linears: Linears::Arm64, .. }) => I2sLayout::Arm64,
            _ => I2sLayout::Blocks128,
        };
        Checkpoint::open_with(&path, OpenOptions { i2s_layout })
            .unwrap_or_else(|error| panic!("{}: {error}", self.name()))
    }
}

type ChangeMatrix = Box<dyn Fn(Linear, TernaryMatrix) -> TernaryMatrix + Send + Sync>;
type ChangeTable = Box<dyn Fn(u64, Table) -> Table + Send + Sync>;

/// A model that is another one with its matrices and tables changed.
pub struct Changed {
    source: SyntheticModel,
    pub config: ModelConfig,
    pub matrix: ChangeMatrix,
    /// Given 0 for the embedding table, 1 for the LM head.
    pub table: ChangeTable,
    /// Signs and block.
    pub rotation: Option<(Signs, usize)>,
}

impl Changed {
    pub fn new(source: SyntheticModel) -> Self {
        let config = source.config().clone();
        let matrix: ChangeMatrix = Box::new(|_, matrix| matrix);
        Self { source, config, matrix, table: Box::new(|_, table| table), rotation: None }
    }

    pub fn rotation_of(&self, k: usize) -> Option<Arc<Rotation>> {
        let (signs, block) = self.rotation?;
        let mut random = Random::new(k as u64);
        let sign = || if random.below(2) == 0 { -1.0 } else { 1.0 };
        let signs = match signs {
            Signs::Identity => vec![1.0; k],
            Signs::Explicit => std::iter::repeat_with(sign).take(k).collect(),
        };
        Some(Arc::new(Rotation { block, signs }))
    }
}

impl WeightSource for Changed {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn embedding(&self) -> sterna::Result<Table> {
        let table = (self.table)(0, self.source.embedding()?);
        let k = table.shape().k();
        Ok(table.with_rotation(self.rotation_of(k)))
    }

    fn lm_head(&self) -> sterna::Result<Option<Table>> {
        Ok(self.source.lm_head()?.map(|table| {
            let table = (self.table)(1, table);
            let k = table.shape().k();
            table.with_rotation(self.rotation_of(k))
        }))
    }

    fn final_norm(&self) -> sterna::Result<Vec<f32>> {
        self.source.final_norm()
    }

    fn layer(&self, index: usize) -> sterna::Result<LayerWeights> {
        let layer = self.source.layer(index)?;
        let change = |linear: Linear, matrix: TernaryMatrix| {
            let matrix = (self.matrix)(linear, matrix);
            match self.rotation_of(matrix.shape().k()) {
                None => matrix,
                rotation => matrix.with_input(Input { norm: None, rotation }),
            }
        };
        Ok(LayerWeights {
            q_proj: change(Q_PROJ, layer.q_proj),
            k_proj: change(K_PROJ, layer.k_proj),
            v_proj: change(V_PROJ, layer.v_proj),
            o_proj: change(O_PROJ, layer.o_proj),
            gate_proj: change(GATE_PROJ, layer.gate_proj),
            up_proj: change(UP_PROJ, layer.up_proj),
            down_proj: change(DOWN_PROJ, layer.down_proj),
            ..layer
        })
    }
}

pub fn all_trits(matrix: &TernaryMatrix) -> Vec<i8> {
    let mut trits = vec![0; matrix.shape().len()];
    for (n, row) in trits.chunks_exact_mut(matrix.shape().k()).enumerate() {
        matrix.row(n, row).expect("valid trits");
    }
    trits
}

fn tensor_scale(matrix: &TernaryMatrix) -> f32 {
    let WeightScale::Tensor(scale) = matrix.scale() else { panic!("one scale a matrix") };
    scale
}

/// What every weight but 0 is in master weights, up to its sign: two thirds of them are not 0, so
/// that their mean is about the scale.
fn master_weight(scale: f32, float: Float) -> f32 {
    let weight = bf16_to_f32(f32_to_bf16(1.5 * scale));
    match float {
        Float::F16 => f16_to_f32(f32_to_f16(weight)),
        Float::Bf16 | Float::F32 => weight,
    }
}

fn encode_floats(float: Float, values: &[f32]) -> Vec<u8> {
    match float {
        Float::Bf16 => values.iter().flat_map(|&v| f32_to_bf16(v).to_le_bytes()).collect(),
        Float::F16 => values.iter().flat_map(|&v| f32_to_f16(v).to_le_bytes()).collect(),
        Float::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

/// A table in a float type: its bytes, and their values. A quantised one is random blocks: what
/// matters is that their values are read, not how they came about.
fn table_of(ty: GgmlType, seed: u64, table: Table) -> (Vec<u8>, Table) {
    let (shape, float) = (table.shape(), ty.float().expect("a float type"));
    let (n, k) = (shape.n(), shape.k());
    let bytes: Vec<u8> = match float.plain() {
        Some(float) => (0..n)
            .flat_map(|n| {
                let mut row = vec![0.0; k];
                table.row(n, &mut row).expect("a valid row");
                encode_floats(float, &row)
            })
            .collect(),
        None => quantised_rows(float, seed, n * float.row_bytes(k).expect("whole blocks")),
    };
    let mut values = vec![0.0; n * k];
    let rows = bytes.chunks_exact(bytes.len() / n);
    for (bytes, out) in rows.zip(values.chunks_exact_mut(k)) {
        float.decode_row(bytes, out);
    }
    (bytes, Table::new(shape, TableData::F32(values.into())))
}

/// Random blocks with scales around 2⁻¹².
fn quantised_rows(ty: FloatType, seed: u64, len_bytes: usize) -> Vec<u8> {
    let (block, scales): (usize, &[usize]) = match ty {
        FloatType::Q4_0 => (18, &[0]),
        FloatType::Q8_0 => (34, &[0]),
        FloatType::Q4K => (144, &[0, 2]),
        FloatType::Q6K => (210, &[208]),
        FloatType::F32 | FloatType::F16 | FloatType::Bf16 => unreachable!("not quantised"),
    };
    let mut random = Random::new(seed + 1);
    let mut bytes: Vec<u8> = (0..len_bytes).map(|_| random.below(256) as u8).collect();
    for block in bytes.chunks_exact_mut(block) {
        for &at in scales {
            let scale = 0x0c00 | random.below(1024) as u16;
            block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
        }
    }
    bytes
}

/// A tensor of a safetensors file.
pub struct Tensor {
    pub name: String,
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// A checkpoint directory before it is bytes, which a test may still spoil.
pub struct HfFiles {
    pub config: Json,
    pub tensors: Vec<Tensor>,
}

impl HfFiles {
    pub fn of(model: &dyn WeightSource, form: Form) -> Self {
        Self { config: config_json(model.config(), form), tensors: hf_tensors(model, form) }
    }

    /// The tensor whose name ends so.
    pub fn tensor(&mut self, name: &str) -> &mut Tensor {
        let found = self.tensors.iter_mut().find(|tensor| tensor.name.ends_with(name));
        found.unwrap_or_else(|| panic!("no tensor {name}"))
    }

    pub fn write(&self, directory: &Path) {
        let config = directory.join("config.json");
        fs::write(config, format!("{:#}", self.config)).expect("a writable directory");
        let bytes = safetensors(&self.tensors);
        fs::write(directory.join("model.safetensors"), bytes).expect("a writable directory");
    }
}

fn hf_tensors(model: &dyn WeightSource, form: Form) -> Vec<Tensor> {
    let config = model.config();
    let mut tensors = Vec::new();
    let mut floats = |name: String, shape: &[usize], float: Float, values: &[f32]| {
        let (dtype, shape) = (dtype(float), shape.to_vec());
        tensors.push(Tensor { name, dtype, shape, bytes: encode_floats(float, values) });
    };
    let naming = Naming::of(config);
    floats(
        naming.final_norm().to_owned(),
        &[config.hidden_size],
        Float::Bf16,
        &model.final_norm().expect("a synthetic model"),
    );
    let tables = [
        (naming.embedding(), Some(model.embedding().expect("a synthetic model"))),
        (naming.lm_head(), model.lm_head().expect("a synthetic model")),
    ];
    let tables: Vec<_> = tables.into_iter().filter_map(|(name, t)| Some((name, t?))).collect();
    let mut packs = Vec::new();
    for (name, table) in tables {
        let shape = table.shape();
        match table.into_data() {
            TableData::Groups(matrix) => packs.push((name.to_owned(), *matrix)),
            TableData::Bf16(bits) => {
                let values: Vec<f32> = bits.iter().copied().map(bf16_to_f32).collect();
                floats(name.to_owned(), &[shape.n(), shape.k()], Float::Bf16, &values);
            }
            _ => panic!("{name}: only tables of bf16 or groups are written here"),
        }
    }
    let mut scales = Vec::new();
    for layer in 0..config.num_hidden_layers {
        let weights = model.layer(layer).expect("a synthetic model");
        for (norm, values) in norms(config).zip(weights.norms().map(|(_, values)| values)) {
            floats(norm.weight(naming, layer), &[values.len()], Float::Bf16, values);
        }
        let LayerWeights { q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, .. } =
            weights;
        let matrices = [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj];
        for (linear, matrix) in LINEARS.into_iter().zip(matrices) {
            let name = linear.weight(naming, layer);
            match form {
                Form::Master(float) => {
                    let (n, k) = (matrix.shape().n(), matrix.shape().k());
                    // The scale is the absmean; what is written, the weight that led to it.
                    let stored = SyntheticModel::new(config.clone(), SEED).stored_scale(k);
                    let weight = master_weight(bf16_to_f32(stored), float);
                    let trits = all_trits(&matrix);
                    let values: Vec<f32> = trits.iter().map(|&t| f32::from(t) * weight).collect();
                    floats(name, &[n, k], float, &values);
                }
                _ => {
                    scales.push((linear.weight_scale(naming, layer), matrix.scale()));
                    packs.push((name, matrix));
                }
            }
        }
    }
    for (name, matrix) in &packs {
        match form {
            Form::Mlx => tensors.extend(mlx_tensors(name, matrix)),
            _ => tensors.push(packed(name, matrix)),
        }
    }
    if form == Form::PackedDivide {
        for (name, scale) in scales {
            let WeightScale::Tensor(scale) = scale else { panic!("one scale a matrix") };
            let bits = f32_to_bf16(1.0 / scale);
            assert_eq!(1.0 / bf16_to_f32(bits), scale, "{name}: the scale is not exact");
            let bytes = bits.to_le_bytes().to_vec();
            tensors.push(Tensor { name, dtype: "BF16", shape: vec![1], bytes });
        }
    }
    tensors
}

fn dtype(float: Float) -> &'static str {
    match float {
        Float::Bf16 => "BF16",
        Float::F16 => "F16",
        Float::F32 => "F32",
    }
}

fn safetensors(tensors: &[Tensor]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for Tensor { name, dtype, shape, bytes } in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        header
            .insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
        data.extend(bytes);
    }
    let json = Json::from(header).to_string();
    [&(json.len() as u64).to_le_bytes(), json.as_bytes(), &data].concat()
}

/// The quarters of the matrix in the four fields of a byte.
fn packed(name: &str, matrix: &TernaryMatrix) -> Tensor {
    let (n, k) = (matrix.shape().n(), matrix.shape().k());
    let (trits, rows) = (all_trits(matrix), n.div_ceil(4));
    let mut bytes = vec![0u8; rows * k];
    for (i, trit) in trits.into_iter().enumerate() {
        let (row, column) = (i / k, i % k);
        bytes[row % rows * k + column] |= ((trit + 1) as u8) << (2 * (row / rows));
    }
    Tensor { name: name.to_owned(), dtype: "U8", shape: vec![rows, k], bytes }
}

/// Codes, scales and biases of an affine pack.
fn mlx_tensors(name: &str, matrix: &TernaryMatrix) -> [Tensor; 3] {
    let (n, k) = (matrix.shape().n(), matrix.shape().k());
    let groups = matrix.groups();
    let is_binary = matrix.alphabet() == Alphabet::Binary;
    let bits = if is_binary { 1 } else { 2 };
    let (mut codes, mut scales, mut biases) = (Vec::new(), Vec::new(), Vec::new());
    let (mut trits, mut of_row) = (vec![0; k], vec![0; groups]);
    for n in 0..n {
        matrix.row_with_scales(n, &mut trits, &mut of_row).expect("valid trits");
        for trits in trits.chunks_exact(32 / bits) {
            let mut word = 0u32;
            for (i, &trit) in trits.iter().enumerate() {
                let code = if is_binary { u32::from(trit > 0) } else { (trit + 1) as u32 };
                word |= code << (bits * i);
            }
            codes.extend(word.to_le_bytes());
        }
        for &scale in &of_row {
            let scale = f16_to_f32(scale);
            let step = if is_binary { 2.0 * scale } else { scale };
            scales.extend(f32_to_f16(step).to_le_bytes());
            biases.extend(f32_to_f16(-scale).to_le_bytes());
        }
    }
    let prefix = name.strip_suffix(".weight").expect("a weight");
    let tensor = |suffix: &str, dtype, columns: usize, bytes| Tensor {
        name: format!("{prefix}.{suffix}"),
        dtype,
        shape: vec![n, columns],
        bytes,
    };
    [
        tensor("weight", "U32", k * bits / 32, codes),
        tensor("scales", "F16", groups, scales),
        tensor("biases", "F16", groups, biases),
    ]
}

fn config_json(config: &ModelConfig, form: Form) -> Json {
    let mut json = json!({
        "architectures": [config.architecture.name()],
        "model_type": config.architecture.model_type(),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": if config.hidden_act == Activation::Silu { "silu" } else { "relu2" },
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": match config.rope_scaling {
            RopeScaling::None => Json::Null,
            RopeScaling::Linear { factor } => json!({"type": "linear", "factor": factor}),
            RopeScaling::Yarn { factor, original_context, .. } => json!({
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original_context,
            }),
            RopeScaling::Llama3 {
                factor, low_freq_factor, high_freq_factor, original_context,
            } => json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": original_context,
            }),
        },
        "tie_word_embeddings": config.tie_word_embeddings,
    });
    match (form, config.weight_form) {
        (Form::Mlx, WeightForm::Mlx { bits, group }) => {
            json["quantization"] = json!({"group_size": group, "bits": bits});
            json["quantization_config"] = json["quantization"].clone();
        }
        (Form::Master(_), _) if config.architecture == Architecture::Bitnet1bitLlm => {
            json["weight_bits"] = 1.into();
            json["input_bits"] = 8.into();
        }
        (Form::Master(_), _) => {
            json["quantization_config"] = json!({
                "quant_method": "bitnet",
                "linear_class": "autobitlinear",
                "quantization_mode": "online",
            });
        }
        _ => json["quantization_config"] = json!({"quant_method": "bitnet"}),
    }
    json
}

/// A GGUF file before it is bytes, which a test may still spoil.
#[derive(Clone)]
pub struct GgufFile {
    pub keys: Vec<(String, Value)>,
    pub tensors: Vec<(TensorPlan, Vec<u8>)>,
    parts: usize,
}

impl GgufFile {
    pub fn of(model: &dyn WeightSource, form: Gguf) -> Self {
        let config = model.config();
        let tensors = gguf_tensors(model, form);
        let mut keys = gguf_keys(config, form.arch);
        let embedding = model.embedding().expect("a synthetic model");
        if embedding.rotation().is_some() {
            keys.extend(rotation_keys(model, &tensors));
        }
        Self { keys, tensors, parts: form.parts }
    }

    /// A key's value.
    pub fn key(&mut self, name: &str) -> &mut Value {
        let found = self.keys.iter_mut().find(|(key, _)| key == name);
        &mut found.unwrap_or_else(|| panic!("no key {name}")).1
    }

    pub fn add_key(&mut self, name: &str, value: Value) {
        self.keys.push((name.to_owned(), value));
    }

    pub fn remove_key(&mut self, name: &str) {
        let before = self.keys.len();
        self.keys.retain(|(key, _)| key != name);
        assert_eq!(self.keys.len() + 1, before, "{name}");
    }

    /// A tensor's description and bytes.
    pub fn tensor(&mut self, name: &str) -> &mut (TensorPlan, Vec<u8>) {
        let found = self.tensors.iter_mut().find(|(plan, _)| plan.name == name);
        found.unwrap_or_else(|| panic!("no tensor {name}"))
    }

    pub fn remove_tensor(&mut self, name: &str) {
        let before = self.tensors.len();
        self.tensors.retain(|(plan, _)| plan.name != name);
        assert_eq!(self.tensors.len() + 1, before, "{name}");
    }

    pub fn add_tensor(&mut self, name: &str, ty: GgmlType, shape: &[usize], bytes: Vec<u8>) {
        let plan = TensorPlan { name: name.to_owned(), ty, shape: shape.to_vec() };
        self.tensors.push((plan, bytes));
    }

    /// The only part.
    pub fn bytes(&self) -> Vec<u8> {
        part_bytes(&self.keys, &self.tensors)
    }

    /// Writes the parts; the path is that of the first.
    pub fn write(&self, directory: &Path) -> PathBuf {
        if self.parts == 1 {
            let path = directory.join("model.gguf");
            fs::write(&path, self.bytes()).expect("a writable directory");
            return path;
        }
        let path = |no: usize| directory.join(format!("model-{no:05}-of-{:05}.gguf", self.parts));
        let each = self.tensors.len().div_ceil(self.parts);
        for (no, tensors) in self.tensors.chunks(each).enumerate() {
            let mut keys = if no == 0 { self.keys.clone() } else { Vec::new() };
            keys.extend([
                ("split.no".to_owned(), Value::U16(no as u16)),
                ("split.count".to_owned(), Value::U16(self.parts as u16)),
                ("split.tensors.count".to_owned(), Value::I32(self.tensors.len() as i32)),
            ]);
            fs::write(path(no + 1), part_bytes(&keys, tensors)).expect("a writable directory");
        }
        path(1)
    }
}

fn part_bytes(keys: &[(String, Value)], tensors: &[(TensorPlan, Vec<u8>)]) -> Vec<u8> {
    let keys: Vec<_> = keys.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
    let plans: Vec<_> = tensors.iter().map(|(plan, _)| plan.clone()).collect();
    let mut writer = Writer::new(Vec::new(), &keys, &plans).expect("a valid plan");
    for (_, bytes) in tensors {
        writer.write(bytes).expect("as long as the plan says");
    }
    writer.finish().expect("complete")
}

fn gguf_keys(config: &ModelConfig, arch: &str) -> Vec<(String, Value)> {
    let mut keys = vec![("general.architecture".to_owned(), Value::String(arch.to_owned()))];
    let mut add = |name: &str, value: Value| keys.push((format!("{arch}.{name}"), value));
    let number = |value: usize| Value::U32(value as u32);
    add("context_length", number(config.max_position_embeddings));
    // Writers differ in the types of integers.
    add("embedding_length", Value::U64(config.hidden_size as u64));
    add("block_count", Value::I32(config.num_hidden_layers as i32));
    add("feed_forward_length", number(config.intermediate_size));
    add("attention.head_count", number(config.num_attention_heads));
    add("attention.head_count_kv", number(config.num_key_value_heads));
    add("attention.layer_norm_rms_epsilon", Value::F32(config.rms_norm_eps));
    add("rope.freq_base", Value::F32(config.rope_theta));
    if config.query_size() != config.hidden_size {
        add("attention.key_length", number(config.head_dim));
        add("attention.value_length", number(config.head_dim));
    }
    match config.rope_scaling {
        RopeScaling::None => {}
        RopeScaling::Linear { factor } => {
            add("rope.scaling.type", Value::String("linear".to_owned()));
            add("rope.scaling.factor", Value::F32(factor));
        }
        RopeScaling::Yarn { factor, original_context, .. } => {
            add("rope.scaling.type", Value::String("yarn".to_owned()));
            add("rope.scaling.factor", Value::F32(factor));
            add("rope.scaling.original_context_length", number(original_context as usize));
        }
        RopeScaling::Llama3 { .. } => panic!("only sterna::convert writes its factors"),
    }
    // Where readers of this name would take the other one.
    if arch == "bitnet" && config.hidden_act == Activation::Relu2 {
        add("hidden_activation", Value::String("relu2".to_owned()));
    }
    keys
}

fn rotation_keys(
    model: &dyn WeightSource,
    tensors: &[(TensorPlan, Vec<u8>)],
) -> Vec<(String, Value)> {
    let config = model.config();
    let layer = model.layer(0).expect("a synthetic model");
    let mut widths = BTreeMap::new();
    for (_, matrix) in layer.linears() {
        let rotation = matrix.input().rotation.clone().expect("a rotated model");
        widths.insert(matrix.shape().k(), rotation);
    }
    let strings = |names: &[&str]| {
        let mut strings = Strings::default();
        names.iter().for_each(|name| strings.push(name));
        Value::Array(Array::String(strings))
    };
    let linears: Vec<String> = (0..config.num_hidden_layers)
        .flat_map(|layer| LINEARS.map(|linear| linear.weight(Naming::Gguf, layer)))
        .collect();
    let mut rotated: Vec<&str> = linears.iter().map(String::as_str).collect();
    let is_there = |name: &str| tensors.iter().any(|(plan, _)| plan.name == name);
    rotated.push(if is_there("output.weight") { "output.weight" } else { "token_embd.weight" });
    let text = |text: &str| Value::String(text.to_owned());
    let block = widths.values().next().expect("a matrix").block;
    let is_identity = widths.values().all(|rotation| rotation.signs.iter().all(|&s| s == 1.0));
    let mut keys = vec![
        ("version", Value::U32(1)),
        ("block_size", Value::U32(block as u32)),
        ("transform", text("normalized-sylvester-walsh-hadamard")),
        ("axis", text("input-last-dimension")),
        ("sign_mode", text(if is_identity { "identity" } else { "explicit" })),
        ("weight_names", strings(&rotated)),
        ("inverse_weight_names", strings(&["token_embd.weight"])),
    ];
    if !is_identity {
        let sizes = widths.keys().map(|&k| k as u32).collect();
        let values = widths.values().flat_map(|rotation| &rotation.signs);
        let values = values.map(|&sign| sign as i8).collect();
        keys.push(("sign_widths", Value::Array(Array::U32(sizes))));
        keys.push(("sign_values", Value::Array(Array::I8(values))));
    }
    keys.into_iter().map(|(key, value)| (format!("prism.hadamard.{key}"), value)).collect()
}

fn gguf_tensors(model: &dyn WeightSource, form: Gguf) -> Vec<(TensorPlan, Vec<u8>)> {
    let config = model.config();
    let naming = Naming::Gguf;
    let mut tensors = Vec::new();
    let mut add = |name: String, ty: GgmlType, shape: &[usize], bytes: Vec<u8>| {
        tensors.push((TensorPlan { name, ty, shape: shape.to_vec() }, bytes));
    };
    let tables = [
        (naming.embedding(), Some(model.embedding().expect("a synthetic model"))),
        (naming.lm_head(), model.lm_head().expect("a synthetic model")),
    ];
    for (seed, (name, table)) in (0..).zip(tables) {
        let Some(table) = table else { continue };
        let shape = [table.shape().n(), table.shape().k()];
        match (form.tables, form.linears) {
            (Some(ty), _) => add(name.to_owned(), ty, &shape, table_of(ty, seed, table).0),
            (None, Linears::Ternary(ty)) => {
                let TableData::Groups(matrix) = table.into_data() else { panic!("a packed table") };
                add(name.to_owned(), ty, &shape, blocks(&matrix, ty.ternary(), 1.0, |n| n));
            }
            (None, _) => panic!("the form says no type for {name}"),
        }
    }
    let norm = |values: &[f32]| encode_floats(Float::F32, values);
    let last = model.final_norm().expect("a synthetic model");
    add(naming.final_norm().to_owned(), GgmlType::F32, &[last.len()], norm(&last));
    for layer in 0..config.num_hidden_layers {
        let weights = model.layer(layer).expect("a synthetic model");
        for (name, values) in weights.norms() {
            let name = name.weight(naming, layer);
            add(name, GgmlType::F32, &[values.len()], norm(values));
        }
        for (linear, matrix) in weights.linears() {
            let shape = [matrix.shape().n(), matrix.shape().k()];
            if let Some(values) = &matrix.input().norm {
                add(linear.norm(naming, layer), GgmlType::F32, &[values.len()], norm(values));
            }
            // Interleaved halves of a head.
            let dim = config.head_dim;
            let is_permuted =
                form.arch == "llama" && [Q_PROJ.path, K_PROJ.path].contains(&linear.path);
            let order = |n: usize| match is_permuted {
                true => n / dim * dim + (n % dim) / 2 + (n % 2) * (dim / 2),
                false => n,
            };
            let name = linear.weight(naming, layer);
            match form.linears {
                Linears::Ternary(ty) => {
                    add(name, ty, &shape, blocks(matrix, ty.ternary(), 1.0, order));
                }
                Linears::Arm64 => {
                    let bytes = blocks(matrix, Some(TernaryType::I2SArm), 1.0, order);
                    add(name, GgmlType::I2S, &shape, bytes);
                }
                Linears::Scaled => {
                    let bytes = blocks(matrix, Some(TernaryType::I2S), 0.5, order);
                    add(name, GgmlType::I2S, &shape, bytes);
                    add(linear.ggml_scale(layer), GgmlType::F32, &[1], norm(&[2.0]));
                }
                Linears::Float(float) => {
                    let (trits, k) = (all_trits(matrix), shape[1]);
                    let scale = tensor_scale(matrix);
                    let values: Vec<f32> = (0..shape[0])
                        .flat_map(|n| &trits[order(n) * k..][..k])
                        .map(|&trit| f32::from(trit) * scale)
                        .collect();
                    let ty = match float {
                        Float::Bf16 => GgmlType::Bf16,
                        Float::F16 => GgmlType::F16,
                        Float::F32 => GgmlType::F32,
                    };
                    add(name, ty, &shape, encode_floats(float, &values));
                }
            }
        }
    }
    tensors
}

/// Rows of blocks, row `n` that of `order(n)`.
fn blocks(
    matrix: &TernaryMatrix,
    ty: Option<TernaryType>,
    factor: f32,
    order: impl Fn(usize) -> usize,
) -> Vec<u8> {
    let ty = ty.expect("a ternary type");
    let (n, k) = (matrix.shape().n(), matrix.shape().k());
    let (mut trits, mut stored) = (vec![0; k], vec![0; matrix.groups()]);
    let mut row = vec![0; ty.row_bytes(k).expect("whole blocks")];
    let mut bytes = Vec::new();
    for n in 0..n {
        matrix.row_with_scales(order(n), &mut trits, &mut stored).expect("valid trits");
        let scales: Vec<u16> = (0..ty.row_scales(k))
            .map(|i| match matrix.scale() {
                WeightScale::Tensor(scale) => f32_to_f16(scale * factor),
                WeightScale::Groups { .. } => stored[i * stored.len() / ty.row_scales(k)],
            })
            .collect();
        ty.encode_row(&trits, &scales, &mut row);
        bytes.extend(&row);
    }
    if ty.group().is_none() {
        bytes.extend(i2s_tail(tensor_scale(matrix) * factor));
    }
    bytes
}

/// What a model answers to the prompt.
pub struct Answer {
    /// Of every position of the prompt, and of every token after it.
    pub logits: Vec<f32>,
    /// The best token at each position after the prompt.
    pub greedy: Vec<u32>,
}

impl Answer {
    fn positions(&self) -> impl ExactSizeIterator<Item = &[f32]> {
        self.logits.chunks_exact(self.logits.len() / (PROMPT.len() + TOKENS))
    }
}

/// The prompt in one batch, then tokens one by one: `forced` ones, or each the best.
pub fn answer(transformer: &mut Transformer, forced: Option<&[u32]>) -> Result<Answer, String> {
    let mut feed = |tokens: &[u32], want| match transformer.feed(tokens, want) {
        Ok(Output::Logits(logits)) => Ok(logits),
        Ok(other) => Err(format!("expected logits, found {other:?}")),
        Err(error) => Err(error.to_string()),
    };
    let mut logits = feed(&PROMPT, Want::AllLogits)?;
    let vocab_size = logits.len() / PROMPT.len();
    let mut greedy = Vec::new();
    for i in 0..TOKENS {
        let last = &logits[logits.len() - vocab_size..];
        let best = cpu_ref::argmax::argmax(last).ok_or("NaN logits")? as u32;
        greedy.push(best);
        let token = forced.map_or(best, |forced| forced[i]);
        logits.extend(feed(&[token], Want::LastLogits)?);
    }
    Ok(Answer { logits, greedy })
}

/// The answer of a model on a device.
pub fn answer_on(
    model: &dyn WeightSource,
    device: Device,
    forced: Option<&[u32]>,
) -> Result<Answer, String> {
    let options = sterna::LoadOptions { context: Some(64), ..sterna::LoadOptions::default() };
    let transformer = Transformer::load(model, device, &options, &mut |_| {});
    answer(&mut transformer.map_err(|error| error.to_string())?, forced)
}

/// Bit for bit the same.
pub fn judge_exact(expected: &Answer, found: &Answer) -> Result<(), String> {
    if expected.logits == found.logits {
        return Ok(());
    }
    let mut pairs = expected.logits.iter().zip(&found.logits);
    let at = pairs.position(|(a, b)| a != b).unwrap_or_default();
    let (a, b) = (expected.logits[at], found.logits[at]);
    Err(format!("logit {at}: expected {a}, found {b}; {}", distance(expected, found)))
}

/// The same after the same tokens, but for a rounding of 2⁻¹¹ or less, which may move int8 codes by
/// a step: logits in the bounds of `tests/golden/README.md`, and the best tokens where they lead by
/// more than 0.4 of the deviation.
pub fn judge_close(expected: &Answer, found: &Answer) -> Result<(), String> {
    let apart = distance(expected, found);
    if !apart.is_close() {
        return Err(apart.to_string());
    }
    let last = expected.positions().skip(PROMPT.len() - 1);
    let mut compared = 0;
    for (i, (logits, (a, b))) in last.zip(expected.greedy.iter().zip(&found.greedy)).enumerate() {
        let best = logits[*a as usize];
        let others = logits.iter().enumerate().filter(|(token, _)| *token != *a as usize);
        let second = others.fold(f32::NEG_INFINITY, |max, (_, &logit)| max.max(logit));
        if f64::from(best - second) > 0.4 * deviation(logits) {
            compared += 1;
            if a != b {
                return Err(format!("token {i}: expected {a}, found {b}"));
            }
        }
    }
    if compared == 0 { Err("no token leads by enough to compare".to_owned()) } else { Ok(()) }
}

fn deviation(values: &[f32]) -> f64 {
    let count = values.len() as f64;
    let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
    let square = values.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / count;
    (square - mean * mean).sqrt()
}

/// The worst of all positions.
#[derive(Debug, Clone, Copy)]
pub struct Distance {
    /// Largest and mean difference, of the standard deviation.
    pub max: f64,
    pub mean: f64,
    pub cosine: f64,
}

impl Distance {
    /// Written so that NaN is far.
    pub fn is_close(&self) -> bool {
        self.max < 0.2 && self.mean < 0.03 && self.cosine > 0.999
    }
}

impl std::fmt::Display for Distance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { max, mean, cosine } = self;
        write!(f, "max {max:.2e}, mean {mean:.2e} of the deviation, cosine {cosine:.6}")
    }
}

/// How far the logits are apart.
pub fn distance(expected: &Answer, found: &Answer) -> Distance {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
    };
    let mut worst = Distance { max: 0.0, mean: 0.0, cosine: 1.0 };
    for (expected, found) in expected.positions().zip(found.positions()) {
        let std = deviation(expected);
        let differences = expected.iter().zip(found).map(|(&a, &b)| f64::from((a - b).abs()) / std);
        let mean = differences.clone().sum::<f64>() / expected.len() as f64;
        let cosine = dot(expected, found) / (dot(expected, expected) * dot(found, found)).sqrt();
        // `f64::max` and `min` would drop a NaN; these keep it.
        for difference in differences {
            worst.max = if difference <= worst.max { worst.max } else { difference };
        }
        worst.mean = if mean <= worst.mean { worst.mean } else { mean };
        worst.cosine = if cosine >= worst.cosine { worst.cosine } else { cosine };
    }
    worst
}
