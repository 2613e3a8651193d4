/* Stands in for pyxis, which Debian does not have: takes its options and shows them to the task. Runs no container. */
#include <slurm/spank.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

SPANK_PLUGIN(pyxis, 1)

static const struct { const char *option, *variable; int has_value; } known[] = {
	{"container-image", "PYXIS_IMAGE", 1},
	{"container-mounts", "PYXIS_MOUNTS", 1},
	{"container-workdir", "PYXIS_WORKDIR", 1},
	{"no-container-mount-home", "PYXIS_NO_HOME", 0},
	{"container-env", "PYXIS_ENVIRONMENT", 1},
};
static char *given[sizeof known / sizeof *known];

static int take(int index, const char *value, int remote)
{
	free(given[index]);
	given[index] = strdup(value && *value ? value : "yes");
	return 0;
}

int slurm_spank_init(spank_t job, int argc, char **argv)
{
	for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
		struct spank_option option = {
			(char *)known[i].option, known[i].has_value ? "VALUE" : NULL, "as pyxis", known[i].has_value, (int)i, take,
		};
		if (spank_option_register(job, &option) != ESPANK_SUCCESS)
			return -1;
	}
	return 0;
}

int slurm_spank_task_init(spank_t job, int argc, char **argv)
{
	for (size_t i = 0; i < sizeof known / sizeof *known; i++)
		if (given[i])
			spank_setenv(job, known[i].variable, given[i], 1);
	return 0;
}
