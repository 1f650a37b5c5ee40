package hypervisor

import (
	"errors"
	"slices"
	"testing"

	"github.com/lmctl/lmctl/migrate"
)

func TestRefusal(t *testing.T) {
	var c Checks
	c.Pass("memory", "%d GiB needed", 4)
	c.Warn("clock", "it is off", "set it")
	c.Err("disk", nil)
	if err := c.Refusal(); err != nil || !c.OK() {
		t.Errorf("refused without a failure: %v", err)
	}
	c.Fail("bridge", "there is no bridge br7", "create it")
	c.Err("disk", errors.New("it cannot be read"))
	c.Refuse("device", "it cannot move; detach it; or wait")
	var refusal *migrate.Refusal
	if err := c.Refusal(); !errors.As(err, &refusal) || c.OK() {
		t.Fatalf("not refused: %v", err)
	}
	if want := []string{"there is no bridge br7; create it", "it cannot be read", "it cannot move; detach it; or wait"}; !slices.Equal(refusal.Reasons, want) {
		t.Errorf("reasons %q, want %q", refusal.Reasons, want)
	}
	if last := c[len(c)-1]; last.Detail != "it cannot move" || last.Advice != "detach it; or wait" {
		t.Errorf("a reason taken apart: %+v", last)
	}
}

func TestChoose(t *testing.T) {
	pass := func(name string) (c Checks) { c.Pass(name, "well"); return c }
	fail := func(name string) (c Checks) { c.Fail(name, "ill", "heal it"); return c }
	names := func(c Checks) (all []string) {
		for _, k := range c {
			all = append(all, k.Name+string("-!x"[k.Verdict]))
		}
		return all
	}
	for _, test := range []struct {
		e      Examination
		wanted migrate.Mode
		mode   migrate.Mode
		want   []string
	}{
		{Examination{pass("a"), pass("d"), pass("r")}, "", migrate.Direct, []string{"a-", "d-"}},
		{Examination{pass("a"), pass("d"), pass("r")}, migrate.Relay, migrate.Relay, []string{"a-", "r-"}},
		{Examination{pass("a"), fail("d"), pass("r")}, "", migrate.Relay, []string{"a-", "r-", "d!"}},
		{Examination{pass("a"), fail("d"), pass("r")}, migrate.Direct, "", []string{"a-", "dx"}},
		{Examination{pass("a"), pass("d"), fail("r")}, migrate.Relay, "", []string{"a-", "rx"}},
		{Examination{pass("a"), fail("d"), fail("r")}, "", "", []string{"a-", "rx", "dx"}},
		{Examination{pass("a"), fail("d"), nil}, "", "", []string{"a-", "dx"}},
		{Examination{pass("a"), pass("d"), nil}, migrate.Relay, "", []string{"a-", "modex"}},
		{Examination{fail("a"), pass("d"), pass("r")}, "", "", []string{"ax", "d-"}},
	} {
		mode, c := test.e.Choose(test.wanted)
		if mode != test.mode || !slices.Equal(names(c), test.want) {
			t.Errorf("%v, wanted %q: %q %q, want %q %q", test.e, test.wanted, mode, names(c), test.mode, test.want)
		}
	}
}
