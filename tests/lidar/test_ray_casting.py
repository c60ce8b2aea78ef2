import numpy as np

from ssl_distill.lidar.ray_casting import Solids, camera_rays, cast, entry_distances


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


def test_golden(golden):
    case = golden("scalr/synthetic_raycast")
    t, p = {name: value.numpy() for name, value in case.tensors.items()}, case.params
    solids = Solids(p["ground_z"], t["boxes"], t["cylinders"], t["spheres"])
    close(entry_distances(t["origin"], t["directions"], solids), t["t_all"])
    hits = cast(t["origin"], t["directions"], solids)
    np.testing.assert_array_equal(hits.solid, t["hit_index"])
    close(hits.distance, t["t_hit"])
    close(hits.normal, t["normal"])
    intrinsics = np.array([[p["fx"], 0, p["cx"]], [0, p["fy"], p["cy"]], [0, 0, 1]])
    close(camera_rays(p["cam_height"], p["cam_width"], intrinsics, t["cam_rotation"]), t["camera_ray_directions"])
