package hypervisor

import (
	"fmt"
	"strings"

	"github.com/lmctl/lmctl/migrate"
)

// Verdict is what a check comes to.
type Verdict int

// The verdicts. Only Fail is a reason to refuse.
const (
	Pass Verdict = iota
	Warn
	Fail
)

// Check is one thing that a migration needs, and what was found of it.
type Check struct {
	Name    string // of the thing, in a word or two
	Verdict Verdict
	Detail  string // what was found
	Advice  string // what to do, unless it passes
}

// Checks are those of one host, in the order in which they are shown. What
// refuses a migration and what is shown beforehand are the same ones.
type Checks []Check

// Pass notes what is as it should be.
func (c *Checks) Pass(name, format string, args ...any) {
	*c = append(*c, Check{Name: name, Detail: fmt.Sprintf(format, args...)})
}

// Warn notes what may be a problem, with what to do about it.
func (c *Checks) Warn(name, detail, advice string) {
	*c = append(*c, Check{Name: name, Verdict: Warn, Detail: detail, Advice: advice})
}

// Fail notes what forbids the migration, with what to do about it.
func (c *Checks) Fail(name, detail, advice string) {
	*c = append(*c, Check{Name: name, Verdict: Fail, Detail: detail, Advice: advice})
}

// Refuse notes reasons in the form that a Refusal has them: what is found,
// a semicolon, what to do.
func (c *Checks) Refuse(name string, reasons ...string) {
	for _, r := range reasons {
		detail, advice, _ := strings.Cut(r, "; ")
		c.Fail(name, detail, advice)
	}
}

// Err notes an error that forbids the migration; nil is none.
func (c *Checks) Err(name string, err error) {
	if err != nil {
		c.Fail(name, err.Error(), "")
	}
}

// Add notes other checks.
func (c *Checks) Add(more Checks) { *c = append(*c, more...) }

// OK says that nothing fails.
func (c Checks) OK() bool { return c.Refusal() == nil }

// Refusal is a *migrate.Refusal with everything that fails, or nil.
func (c Checks) Refusal() error {
	var reasons []string
	for _, check := range c {
		if check.Verdict != Fail {
			continue
		}
		reason := check.Detail
		if check.Advice != "" {
			reason += "; " + check.Advice
		}
		reasons = append(reasons, reason)
	}
	if len(reasons) == 0 {
		return nil
	}
	return &migrate.Refusal{Reasons: reasons}
}

// Examination is what the source finds about a guest that is to leave.
type Examination struct {
	Any    Checks // what every mode needs
	Direct Checks // what only the direct mode needs
	Relay  Checks // what only the relay mode needs; nil if the hypervisor has none
}

// For are the checks of a mode.
func (e *Examination) For(mode migrate.Mode) Checks {
	c := append(Checks(nil), e.Any...)
	switch {
	case mode != migrate.Relay:
		return append(c, e.Direct...)
	case e.Relay == nil:
		c.Fail("mode", "guests of this hypervisor move in direct mode only", "leave the mode to lmctl")
	}
	return append(c, e.Relay...)
}

// Choose is the mode in which the guest would move, empty if in none, and the
// checks that say so. As the engine does, it prefers direct unless a mode is
// wanted.
func (e *Examination) Choose(wanted migrate.Mode) (migrate.Mode, Checks) {
	mode := wanted
	switch {
	case wanted != "":
	case e.Direct.OK() || e.Relay == nil:
		mode = migrate.Direct
	case e.Relay.OK():
		mode = migrate.Relay
	default:
		return "", append(e.For(migrate.Relay), e.Direct...)
	}
	c := e.For(mode)
	if mode != wanted && mode == migrate.Relay {
		for _, d := range e.Direct {
			if d.Verdict == Fail {
				c.Warn(d.Name, "not in direct mode: "+d.Detail, d.Advice)
			}
		}
	}
	if !c.OK() {
		mode = ""
	}
	return mode, c
}
