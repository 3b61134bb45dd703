"""The fast engine becomes the default; policies of before could name no other engine than Keras, so they follow."""

from django.db import migrations, models

CHOICES = [("cohort", "cohort: the fast engine"), ("keras", "Keras: the reference, some ten times slower")]


def follow(apps, _schema_editor):
    apps.get_model("federation", "FederationPolicy").objects.filter(engine="keras").update(engine="cohort")


class Migration(migrations.Migration):

    dependencies = [
        ("federation", "0001_initial"),
    ]

    operations = [
        migrations.AlterField(
            model_name="federationpolicy",
            name="engine",
            field=models.CharField(choices=CHOICES, default="cohort", max_length=16, verbose_name="engine"),
        ),
        migrations.AlterField(
            model_name="modeltrainingsession",
            name="engine",
            field=models.CharField(choices=CHOICES, max_length=16, verbose_name="engine"),
        ),
        migrations.RunPython(follow, migrations.RunPython.noop),
    ]
