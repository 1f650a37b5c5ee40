package lab

import "testing"

func TestWhereAGuestIs(t *testing.T) {
	for _, tc := range []struct {
		e    notOnOneHost
		want string
	}{
		{notOnOneHost{guest: "g"}, "lab: guest g: runs on no host (no host has it)"},
		{notOnOneHost{guest: "g", seen: []string{"stopped on host1", "no agent on host2"}}, "lab: guest g: runs on no host (stopped on host1, no agent on host2)"},
		{notOnOneHost{guest: "g", at: []string{"host1", "host2"}, seen: []string{"migrating on host1", "running on host2"}}, "lab: guest g: runs on host1 and host2 (migrating on host1, running on host2)"},
	} {
		if got := tc.e.Error(); got != tc.want {
			t.Errorf("%q, want %q", got, tc.want)
		}
	}
}
