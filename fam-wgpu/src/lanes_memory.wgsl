// Where shaders have no subgroups, threads meet in workgroup memory alone: see lanes_subgroup.wgsl.

fn are_lanes(thread: u32) -> bool {
    return false;
}

fn largest_of_lanes(x: vec4<f32>) -> vec4<f32> {
    return x;
}
