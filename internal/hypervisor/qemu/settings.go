package qemu

import (
	"context"
	"fmt"
	"slices"
	"strings"
)

// settings are QEMU's migration capabilities and parameters that a migration
// changes, as they were before it.
type settings struct {
	Capabilities map[string]bool  `json:"capabilities"`
	Parameters   map[string]int64 `json:"parameters"`
}

// The settings of a source: RAM stays out of the stream, and QEMU halts once
// the guest stands still. Neither bandwidth nor the rest that is left may hold
// it up: what goes across is ROMs and the like.
var sourceSettings = settings{
	Capabilities: map[string]bool{"events": true, "x-ignore-shared": true, "pause-before-switchover": true},
	Parameters:   map[string]int64{"max-bandwidth": 1 << 40, "downtime-limit": 50},
}

// maxDowntimeLimit in milliseconds makes any rest small enough, QEMU's maximum.
const maxDowntimeLimit = 2000 * 1000

// The settings of a shell: it takes the disks' locks only when it runs, and
// leaves announcing the guest to us.
var shellSettings = settings{
	Capabilities: map[string]bool{"events": true, "late-block-activate": true},
	Parameters:   map[string]int64{"announce-rounds": 0},
}

// current reads those of QEMU's settings that want would change.
func currentSettings(ctx context.Context, mon *monitor, want settings) (settings, error) {
	var caps []struct {
		Capability string `json:"capability"`
		State      bool   `json:"state"`
	}
	if err := mon.run(ctx, "query-migrate-capabilities", nil, &caps); err != nil {
		return settings{}, err
	}
	var params map[string]any
	if err := mon.run(ctx, "query-migrate-parameters", nil, &params); err != nil {
		return settings{}, err
	}
	now := settings{Capabilities: make(map[string]bool), Parameters: make(map[string]int64)}
	for _, c := range caps {
		if _, ok := want.Capabilities[c.Capability]; ok {
			now.Capabilities[c.Capability] = c.State
		}
	}
	for name := range want.Parameters {
		if value, ok := params[name].(float64); ok {
			now.Parameters[name] = int64(value)
		}
	}
	var missing []string
	for name := range want.Capabilities {
		if _, ok := now.Capabilities[name]; !ok {
			missing = append(missing, name)
		}
	}
	if len(missing) > 0 {
		slices.Sort(missing)
		return settings{}, fmt.Errorf("QEMU %s has no migration capability %s; version 7.2 has", mon.version, strings.Join(missing, ", "))
	}
	return now, nil
}

// apply sets what s names.
func (s settings) apply(ctx context.Context, mon *monitor) error {
	type capability struct {
		Capability string `json:"capability"`
		State      bool   `json:"state"`
	}
	var caps []capability
	for name, state := range s.Capabilities {
		caps = append(caps, capability{name, state})
	}
	slices.SortFunc(caps, func(a, b capability) int { return strings.Compare(a.Capability, b.Capability) })
	if err := mon.run(ctx, "migrate-set-capabilities", object{"capabilities": caps}, nil); err != nil {
		return err
	}
	return mon.run(ctx, "migrate-set-parameters", s.Parameters, nil)
}
