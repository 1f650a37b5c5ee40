// Package packaging holds what is installed beside the binary: the agent's unit
// and configuration, rules for AppArmor, the Debian package. There is no code
// in it but the tests of those files.
package packaging
