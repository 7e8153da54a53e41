# Adapts CleanRL's PQN script, whose EnvPool calls are of an older version, to EnvPool 1.2.5 and Gymnasium:
#
#     url=https://raw.githubusercontent.com/vwxyzjn/cleanrl/fe8d8a03c41a7ef5b523e2e354bd01c363e786bb/cleanrl
#     mkdir -p ../cleanrl && curl -fL $url/pqn_atari_envpool.py | sed -f benchmark/cleanrl_pqn.sed > ../cleanrl/pqn_atari_envpool.py
#
# Network, arithmetic (float32) and loop stay as they are. Its speed beside ours, as in the README:
#
#     python benchmark/throughput.py --peer ../cleanrl/pqn_atari_envpool.py --steps 40960 --rounds 3
#
s/^import gym$/import gymnasium as gym/
s/env_type="gym"/env_type="gymnasium"/

# The emulator's actions are int32; reset and step return one value more
s/observations = super()\.reset(/observations, _ = super().reset(/
s/^        return observations$/&, {}/
s/envs\.reset())/envs.reset()[0])/
s/super()\.step(action)/super().step(action.astype(np.int32))/
s/^\( *observations, rewards, \)dones\(, infos = super().*\)$/\1terminated, truncated\2\
        dones = terminated | truncated/

# EnvPool says itself how many games it plays; what it is given besides belongs on the wrapper
s/getattr(env, "num_envs", 1)/env.config["num_envs"]/
/^    envs\.num_envs = /d
/^    envs\.single_[a-z]*_space = /d
s/^    envs = RecordEpisodeStatistics(envs)$/&\
    envs.single_action_space, envs.single_observation_space = envs.action_space, envs.observation_space/
