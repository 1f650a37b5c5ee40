package qemu

import (
	"context"
	"fmt"
	"slices"
	"strings"
)

// cpuFacts is the CPU that a guest sees, as QEMU built it: CPUID is not part
// of the device state, so that both ends must build the same one.
type cpuFacts struct {
	Vendor   string      `json:"vendor"`
	Family   int         `json:"family"`
	Model    int         `json:"model"`
	Stepping int         `json:"stepping"`
	Words    []cpuidWord `json:"words"`
}

// cpuidWord is one CPUID register of the guest's CPU.
type cpuidWord struct {
	EAX      uint32  `json:"cpuid-input-eax"`
	ECX      *uint32 `json:"cpuid-input-ecx,omitempty"`
	Register string  `json:"cpuid-register"`
	Features uint32  `json:"features"`
}

func (w cpuidWord) name() string {
	if w.ECX == nil {
		return fmt.Sprintf("CPUID leaf %#x %s", w.EAX, w.Register)
	}
	return fmt.Sprintf("CPUID leaf %#x/%d %s", w.EAX, *w.ECX, w.Register)
}

// queryCPU reads the CPU that the guest sees.
func queryCPU(ctx context.Context, mon *monitor) (*cpuFacts, error) {
	var cpus []struct {
		Path string `json:"qom-path"`
	}
	if err := mon.run(ctx, "query-cpus-fast", nil, &cpus); err != nil {
		return nil, err
	}
	if len(cpus) == 0 {
		return nil, fmt.Errorf("QMP query-cpus-fast: the guest has no CPU")
	}
	var f cpuFacts
	for _, p := range []struct {
		property string
		out      any
	}{{"vendor", &f.Vendor}, {"family", &f.Family}, {"model", &f.Model}, {"stepping", &f.Stepping}, {"feature-words", &f.Words}} {
		if err := mon.run(ctx, "qom-get", object{"path": cpus[0].Path, "property": p.property}, p.out); err != nil {
			return nil, fmt.Errorf("read the guest's CPU: %s: %w", p.property, err)
		}
	}
	slices.SortFunc(f.Words, func(a, b cpuidWord) int { return strings.Compare(a.name(), b.name()) })
	return &f, nil
}

// lacking says what a guest that saw the CPU f would miss on the CPU other.
// What other has more does no harm: the guest has looked long ago.
func (f *cpuFacts) lacking(other *cpuFacts) []string {
	var reasons []string
	if f.Vendor != other.Vendor || f.Family != other.Family || f.Model != other.Model {
		reasons = append(reasons, fmt.Sprintf("the guest's CPU is %s family %d model %d, here it would be %s family %d model %d",
			f.Vendor, f.Family, f.Model, other.Vendor, other.Family, other.Model))
	}
	has := make(map[string]uint32, len(other.Words))
	for _, w := range other.Words {
		has[w.name()] = w.Features
	}
	for _, w := range f.Words {
		if missing := w.Features &^ has[w.name()]; missing != 0 {
			reasons = append(reasons, fmt.Sprintf("the guest's CPU has features that this host lacks: %s bits %s", w.name(), bitList(missing)))
		}
	}
	for i := range reasons {
		reasons[i] += "; start the guest with a cpu model that both hosts have"
	}
	return reasons
}

func bitList(word uint32) string {
	var bits []string
	for i := range 32 {
		if word&(1<<i) != 0 {
			bits = append(bits, fmt.Sprint(i))
		}
	}
	return strings.Join(bits, ",")
}
